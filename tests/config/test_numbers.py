"""Every number of a configuration or of a command is finite and bounded, wherever it comes from."""

import math

import numpy as np
import pytest
from test_validation import ready

from jaxalign import cli
from jaxalign.commands import models
from jaxalign.config import ALGORITHMS, defaults, leaves, validate
from jaxalign.data.source import parse_sources
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.overrides import override
from jaxalign.ranges import BOUNDS, FLAG_BOUNDS, check_flags, misfit


def numeric(algorithm):
    """(field, type) of every field that holds a number."""
    tree = defaults(algorithm)
    for field in leaves(tree):
        *parents, leaf = field.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if node.get_type(leaf) in (int, float):
            yield field, node.get_type(leaf)


EVERY = sorted({(a, f, kind) for a in ALGORITHMS for f, kind in numeric(a)}, key=str)


def put(config, field, value):
    """Sets a field past the types that the tree itself holds to, as a file may by `ignore_type`."""
    *parents, leaf = field.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[leaf] = value


def test_every_number_has_finite_bounds_and_no_other_field_has():
    rows = [field for field, _, _ in BOUNDS]
    assert len(rows) == len(set(rows))
    assert {field for _, field, _ in EVERY} == set(rows)
    assert all(math.isfinite(low) and math.isfinite(high) and low < high for _, low, high in BOUNDS)


def test_every_numeric_flag_of_a_command_has_bounds(monkeypatch):
    flags = set()
    parser = models.parser
    monkeypatch.setattr(models, "parser", lambda name, text, *rows: flags.update(rows) or parser(name, text, *rows))
    for command in ("export", "generate", "chat", "logprobs", "score", "evaluate", "compare", "doctor"):
        assert cli.main([command, "--help"]) == 0
    assert {flag.lstrip("-") for flag, kind, *_ in flags if kind in (int, float)} == {row[0] for row in FLAG_BOUNDS}


BAD = [float("nan"), float("inf"), -float("inf"), 1e300, "3", [1], np.float64("nan"), 1j]


@pytest.mark.parametrize("algorithm,field,kind", EVERY)
def test_no_field_takes_a_number_that_is_none(algorithm, field, kind):
    # The tree makes floats of whole numbers and of truth values that are put into a field of floats.
    for value in BAD + ([1.5, np.float64(2.0), 10**400, -(10**400), True] if kind is int else []):
        c = ready(algorithm)
        put(c, field, value)
        with pytest.raises(InputError) as raised:
            validate(c)
        assert raised.value.found.startswith(f"{field} is ") and raised.value.fix.startswith(f"--config.{field}="), (
            value
        )
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_from_flags(algorithm):
    for field, kind in numeric(algorithm):
        for text in ["nan", "inf", "-inf", "1e999", "-1e999", "9" * 400] if kind is float else ["1e999", "9" * 400]:
            c = ready(algorithm)
            with pytest.raises(InputError, match=field):
                override(c, field, text)
                validate(c)


def test_numpys_numbers_are_numbers():
    assert not misfit(np.int64(3), 1, 4, whole=True) and not misfit(np.float32(0.5), 0, 1)
    assert (
        misfit(True, 0, 1)
        and misfit(10**400, 0, 1)
        and misfit(np.bool_(True), 0, 1)
        and misfit(np.float32("nan"), 0, 1)
    )


@pytest.mark.parametrize(
    "line", ["c.batch_size = True", "c.optimizer.learning_rate = float('nan')", "c.seed = 10**5000"]
)
def test_from_a_file(tmp_path, line):
    (tmp_path / "c.py").write_text(
        "from jaxalign.config import defaults\n\n\ndef get_config():\n"
        f'    c = defaults("sft")\n    {line}\n    c.workdir, c.model.path = "w", "m"\n'
        '    c.data.sources = ("d",)\n    return c\n'
    )
    with pytest.raises(InputError, match=r"number from"):
        validate(load_config(str(tmp_path / "c.py")))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0, -1, True, "2", 1e12, 10**400])
def test_the_weight_of_a_source(weight):
    with pytest.raises(InputError, match="weight"):
        parse_sources(({"path": "a.jsonl", "weight": weight},))


@pytest.mark.parametrize("flag", [row[0] for row in FLAG_BOUNDS])
def test_flags_of_commands(flag):
    _, low, high, example = next(row for row in FLAG_BOUNDS if row[0] == flag)
    check_flags(**{flag: example})
    for value in [math.nan, math.inf, -math.inf, low - 1, high + 1]:
        with pytest.raises(InputError, match=f"--{flag}"):
            check_flags(**{flag: value})


@pytest.mark.parametrize(
    "argv",
    [
        "generate --model m --prompt p --temperature nan",
        "generate --model m --prompt p --temperature inf",
        "generate --model m --prompt p --temperature 1e-30",
        "generate --model m --prompt p --max_new_tokens=-1",
        "generate --model m --prompt p --top_p 2",
        "generate --model m --prompt p --top_k=-1",
        "generate --model m --prompt p --seed=-1",
        "generate --model m --prompt p --seed 99999999999999999999999",
        "score --model m --data d --ref r --beta inf",
        "score --model m --data d --ref r --beta nan",
        "compare --base b --aligned a --data d --confidence 5",
        "compare --base b --aligned a --data d --confidence nan",
        "compare --base b --aligned a --data d --num_prompts 0",
        "compare --base b --aligned a --data d --show=-1",
    ],
)
def test_numbers_of_commands(capsys, argv):
    assert cli.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and ("number from" in err or "0.001 and more" in err)


@pytest.mark.parametrize(
    "axes,words",
    [({"data": 0}, "mesh.data is 0"), ({"data": -1, "fsdp": -1}, "at most one"), ({"tensor": -2}, "mesh.tensor")],
)
def test_axes_of_the_mesh(axes, words):
    c = ready("sft")
    c.mesh.update(axes)
    with pytest.raises(InputError, match=words):
        validate(c)
