"""Reward functions: found by name, called as documented, checked."""

import asyncio
import textwrap

import numpy as np
import pytest

from jaxalign.data.records import Record
from jaxalign.errors import InputError
from jaxalign.functions import load_function
from jaxalign.rewards.function import FunctionScorer
from jaxalign.rewards.samples import Samples


def samples(n=3):
    return Samples(
        prompts=[f"p{i}" for i in range(n)],
        completions=[f"c{i}" for i in range(n)],
        completion_ids=[[i, 2] for i in range(n)],
        finished=[True] * n,
        records=[Record(i, "data.jsonl", i + 1, "prompt", prompt=f"p{i}", columns={"gold": i / 4}) for i in range(n)],
        step=7,
    )


def test_a_function_gets_everything_by_name():
    seen = {}

    def reward(prompts, completions, *, records, completion_ids, finished, step, **columns):
        seen.update(locals())
        return [0.25] * len(prompts)

    assert FunctionScorer(reward)(samples()) == [0.25] * 3
    assert seen["prompts"] == ["p0", "p1", "p2"] and seen["completions"] == ["c0", "c1", "c2"]
    assert seen["completion_ids"] == [[0, 2], [1, 2], [2, 2]] and seen["finished"] == [True] * 3
    assert seen["step"] == 7 and [r.line for r in seen["records"]] == [1, 2, 3]
    assert seen["columns"] == {"gold": [0.0, 0.25, 0.5]}


def test_a_function_gets_only_what_it_names():
    assert FunctionScorer(lambda prompts, completions, gold: gold)(samples()) == [0.0, 0.25, 0.5]
    assert FunctionScorer(lambda prompts, completions: [len(c) for c in completions])(samples()) == [2.0] * 3


def test_columns_that_some_records_lack_are_none_there():
    mixed = samples()
    mixed.records[1] = mixed.records[1]._replace(columns={"other": "x"})
    seen = {}
    FunctionScorer(lambda prompts, completions, **columns: seen.update(columns) or [0] * 3)(mixed)
    assert seen["gold"] == [0.0, None, 0.5] and seen["other"] == [None, "x", None]


def test_async_functions_are_waited_for():
    async def reward(prompts, completions, **_):
        return list(await asyncio.gather(*(one(c) for c in completions)))

    async def one(completion):
        await asyncio.sleep(0.001)
        return int(completion[1]) / 2

    assert FunctionScorer(reward)(samples()) == [0.0, 0.5, 1.0]

    async def inside_a_running_loop():  # a notebook's
        return FunctionScorer(reward)(samples())

    assert asyncio.run(inside_a_running_loop()) == [0.0, 0.5, 1.0]

    async def fails(prompts, completions, **_):
        raise KeyError("x")

    async def failing():
        return FunctionScorer(fails)(samples())

    with pytest.raises(InputError, match="raised KeyError: 'x'"):
        asyncio.run(failing())


def test_trap_fractions_and_none_pass_through():
    values = [0.3, None, np.float32(1.5)]
    assert FunctionScorer(lambda p, c: values)(samples()) == [0.3, None, 1.5]
    assert FunctionScorer(lambda p, c: np.array([0.1, 0.2, 0.3]))(samples()) == [0.1, 0.2, 0.3]
    assert FunctionScorer(lambda p, c: [True, False, 1])(samples()) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "result,expected",
    [
        ([0.0, 1.0], "returned 2 values"),
        (0.5, "returned float"),
        (None, "returned NoneType"),
        ({"a": 1}, "returned dict"),
        ([0.0, float("nan"), 0.0], r"nan for record 1 \(data.jsonl:2\)"),
        ([0.0, 1.0, float("inf")], r"inf for record 2 \(data.jsonl:3\)"),
        ([0.0, "good", 1.0], r"'good' for record 1 \(data.jsonl:2\)"),
    ],
)
def test_wrong_results_name_the_record(result, expected):
    with pytest.raises(InputError, match=expected) as error:
        FunctionScorer(lambda p, c: result, "rewards.py:reward")(samples())
    assert "rewards.py:reward" in str(error.value)


def test_an_exception_says_where_it_was(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\n"
        "def inner(c):\n"
        "    return json.loads(c)\n"
        "def reward(prompts, completions):\n"
        "    return [inner(c) for c in completions]\n"
        "def empty(prompts, completions):\n"
        "    raise NotImplementedError\n"
    )
    with pytest.raises(InputError) as error:
        FunctionScorer(load_function(f"{path}:reward"), "mine.py:reward")(samples())
    found = error.value.found.splitlines()
    assert found[0].startswith("mine.py:reward, at step 7 on 3 completions, raised JSONDecodeError: Expecting value")
    assert f"{path}:5, in reward: return [inner(c) for c in completions]" in found[1]
    assert any(f"{path}:3, in inner: return json.loads(c)" in line for line in found)
    assert "jaxalign/rewards" not in error.value.found and isinstance(error.value.__cause__, ValueError)
    assert error.value.expected.startswith("a list of 3 numbers") and error.value.fix == f"correct {path}:3"
    with pytest.raises(InputError, match="raised NotImplementedError\n") as error:
        FunctionScorer(load_function(f"{path}:empty"), "mine.py:empty")(samples())
    assert error.value.fix == f"correct {path}:7"
    with pytest.raises(InputError, match="raised ZeroDivisionError"):  # a function without a file of its own
        FunctionScorer(eval("lambda prompts, completions: 1 / 0"))(samples())


@pytest.mark.parametrize("text,line", [("x = 1\ndef reward(:\n", 2), ("x = 1\n\nx.nothing\n", 3)])
def test_a_file_that_python_does_not_run_says_where(tmp_path, monkeypatch, text, line):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=r"mine\.py, read for 'reward', raised (SyntaxError|AttributeError)") as error:
        load_function("mine.py:reward")
    assert error.value.fix == f"correct {path}:{line}" and f"{path}:{line}" in error.value.found


def test_functions_are_found_in_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass

            @dataclass
            class Half:
                value: float = 0.5

            def polite(prompts, completions):
                return [Half().value] * len(prompts)

            number = 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    assert load_function("my_rewards.py:polite")([1], [1]) == [0.5]
    assert load_function(f"{tmp_path}/my_rewards.py:polite")([1], [1]) == [0.5]
    assert load_function("os.path:basename")("a/b") == "b"
    with pytest.raises(InputError, match=r"my_rewards\.py:polite"):
        load_function("my_rewards.py:polit")
    with pytest.raises(InputError, match=r"function=my_rewards\.py:polite"):
        load_function("my_reward.py:polite")
    with pytest.raises(InputError, match=r"no function 'number'"):
        load_function("my_rewards.py:number")
    with pytest.raises(InputError, match=r"function=my_rewards\.py:polite"):
        load_function("my_rewards:polite")  # not importable: the file is offered
    with pytest.raises(InputError, match="module:function or file"):
        load_function("my_rewards.py")
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    with pytest.raises(InputError, match=r"ModuleNotFoundError: .*not_there_at_all"):
        load_function("broken.py:reward")
