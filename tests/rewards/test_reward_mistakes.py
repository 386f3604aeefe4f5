"""Reward functions with a mistake in them: what is wrong is said, at the start where it can be known by then."""

import asyncio
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.functions import load_function
from jaxalign.rewards.function import FunctionScorer
from tests.rewards.test_reward_function import samples


class Odd:
    """A number whose every method raises."""

    def __float__(self):
        raise RuntimeError("no")

    __repr__ = __float__


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        10**5000,  # which Python does not even print
        -1e39,
        1e19,  # finite, and its square is not in float32
        float("-inf"),
        np.float32("nan"),
        1 + 2j,
        np.complex64(1 + 2j),  # float() would drop a part of it with a warning
        np.array(1 + 2j),
        "0.5",
        np.str_("0.5"),
        b"1",
        [0.5],
        np.array([0.5]),  # a column of shape [N, 1]
        np.datetime64("2026-01-01"),
        np.timedelta64(3, "s"),
        Odd(),
        object(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_value_that_is_no_score_names_the_record(value):
    with pytest.raises(InputError, match=r"for record 1 \(data.jsonl:2\)") as error:
        FunctionScorer(lambda p, c: [0.5, value, 0.5])(samples())
    assert "finite number" in error.value.expected and len(error.value.found) < 300


def test_numbers_of_any_kind_are_scores():
    import fractions

    import jax.numpy as jnp

    kinds = [np.int8(1), np.bool_(True), np.float16(0.5), jnp.bfloat16(0.25), jnp.float32(2), fractions.Fraction(1, 4)]
    found = FunctionScorer(lambda p, c: kinds[: len(p)])(samples(6))
    assert found == [1.0, 1.0, 0.5, 0.25, 2.0, 0.25]
    assert FunctionScorer(lambda p, c: np.array([np.nan, 1.0, 2.0])[1:])(samples(2)) == [1.0, 2.0]


@pytest.mark.parametrize(
    "result", [{0.1, 0.2, 0.3}, (x for x in (1, 2, 3)), np.array(0.5), "abc", b"abc", 0.5, np.zeros(3)[:2], []]
)
def test_a_result_that_is_no_list_of_one_score_each(result):
    with pytest.raises(InputError, match="returned") as error:
        FunctionScorer(lambda p, c: result)(samples())
    assert error.value.expected.startswith("a list of 3 numbers")


def swapped(completions, prompts):
    return [0.0] * len(prompts)


def one(completions, **columns):
    return [0.0] * len(completions)


def by_name(*, prompts, completions):
    return [0.0] * len(prompts)


def none():
    return []


def third_by_place(prompts, completions, other, /):
    return [0.0] * len(prompts)


def yields(prompts, completions):
    yield 0.5


class Scores:
    def __init__(self, prompts, completions):
        pass


class YieldsWhenCalled:
    def __call__(self, prompts, completions):
        yield 0.5


@pytest.mark.parametrize(
    "function",
    [swapped, one, by_name, none, third_by_place, yields, Scores, YieldsWhenCalled(), functools.partial(one)],
)
def test_a_signature_that_cannot_be_called_is_refused_before_the_first_rollout(function):
    with pytest.raises(InputError) as error:
        FunctionScorer(function, "mine.py:reward")
    assert "mine.py:reward" in error.value.found and "rewards/function.py" not in str(error.value)
    if function in (swapped, one, by_name, none):
        assert "prompts, completions" in error.value.expected and __file__ in error.value.fix


class Called:
    def __call__(self, prompts, completions, step):
        return [step] * len(prompts)


def test_signatures_that_can_be_called_are():
    def gathers(*args, **columns):
        return [len(args)] * len(args[0])

    def defaults(prompts, completions, gold=None, absent=0.25):
        return [absent] * len(prompts)

    def question(gold, answer, **columns):  # a column of the data has the name of the first argument
        return [float("gold" in columns)] * len(gold)

    async def later(prompts, completions, *, gold):
        await asyncio.sleep(0)
        return gold

    found = [FunctionScorer(f)(samples(2)) for f in (Called(), gathers, defaults, question, later, max)[:5]]
    assert found == [[7.0] * 2, [2.0] * 2, [0.25] * 2, [0.0] * 2, [0.0, 0.25]]
    assert FunctionScorer(functools.partial(defaults, absent=0.5))(samples(2)) == [0.5] * 2
    assert FunctionScorer(max).needs == frozenset()  # a builtin does not tell its signature


def test_a_column_that_the_data_has_not_is_told_before_the_first_rollout():
    def needs(prompts, completions, gold, golden):
        return [g is None for g in golden]

    scorer = FunctionScorer(needs, "mine.py:needs")
    assert scorer.needs == {"gold", "golden"}
    with pytest.raises(InputError, match="needs golden") as error:
        scorer.expect({"gold", "other"})
    assert "gold, other" in error.value.expected and error.value.fix.startswith("gold in place of golden")
    with pytest.raises(InputError, match="needs golden"):
        scorer(samples())
    scorer.expect({"gold", "golden"})  # it is there, if not in this batch
    assert scorer(samples()) == [1.0] * 3


def test_an_error_is_never_blamed_on_a_file_of_ours():
    def reward(prompts, completions):
        raise SystemExit(0)

    for function in (reward, eval("lambda p, c: [][1]"), functools.partial(lambda p, c, x: x, y=1)):
        with pytest.raises(InputError) as error:
            FunctionScorer(function, "mine.py:reward")(samples())
        assert "rewards/function.py" not in error.value.fix


class Own(BaseException):
    """An error that is no Exception."""


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    "error", [Own("mine"), GeneratorExit(), asyncio.CancelledError(), Mute(), ValueError("x" * 100_000)]
)
@pytest.mark.parametrize("awaited", [False, True])
def test_whatever_a_reward_raises_is_told_in_a_few_lines(error, awaited):
    def reward(prompts, completions):
        raise error

    async def later(prompts, completions):
        raise error

    with pytest.raises(InputError, match=f"mine.py:reward.*{type(error).__name__}") as told:
        FunctionScorer(later if awaited else reward, "mine.py:reward")(samples())
    assert len(str(told.value)) < 3000


def test_ctrl_c_in_a_reward_is_no_mistake_of_it():
    def reward(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionScorer(reward)(samples())


EXITS = {
    "at import": "import sys\nsys.exit(0)\ndef reward(prompts, completions):\n    return [0.0] * len(prompts)\n",
    "in the call": "import sys\ndef reward(prompts, completions):\n    sys.exit(0)\n",
    "in an awaited call": "import sys\nasync def reward(prompts, completions):\n    sys.exit(0)\n",
}


@pytest.mark.parametrize("where", EXITS)
@pytest.mark.parametrize("form", ["file", "module"])
def test_sys_exit_in_a_reward_ends_nothing_quietly(where, form, tmp_path, monkeypatch):
    name = f"leaves_{where.replace(' ', '_')}_{form}"
    file = tmp_path / f"{name}.py"
    file.write_text(EXITS[where])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="SystemExit: 0") as error:
        FunctionScorer(load_function(f"{file if form == 'file' else name}:reward"))(samples())
    assert str(file) in error.value.fix


def test_a_module_with_a_mistake_says_where(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"lacks_a_part": "import not_there_at_all\n", "is_no_python": "def reward(:\n", "fails": "1 / 0\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(InputError) as error:
            load_function(f"{name}:reward")
        assert error.value.fix == f"correct {tmp_path / name}.py:1", name
    for name in ("..", ".relative", "not_there.at_all", "a b"):
        with pytest.raises(InputError, match="no module"):
            load_function(f"{name}:reward")


@pytest.mark.parametrize("text", [EXITS["at import"], "def reward(completions):\n    return []\n"])
def test_the_command_says_so_before_it_reads_a_model(tmp_path, text):
    """Exit status 2 and the reason, where it was 0 and silence, or an error after the first rollout."""
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    (tmp_path / "c.py").write_text(
        "from jaxalign.config import defaults\n"
        "def get_config():\n"
        "    c = defaults('ppo')\n"
        "    c.workdir, c.model.path, c.data.sources = 'run', 'nowhere', ('d.jsonl',)\n"
        "    c.rewards.function = 'mine.py:reward'\n"
        "    return c\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "jaxalign", "train", "--config=c.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 2 and "mine.py" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "run").exists()
