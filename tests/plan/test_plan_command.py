"""`jaxalign plan`: its flags, and what it refuses before anything is compiled; compiling is tests/absent."""

import importlib.util

import pytest

from jaxalign.cli import main
from jaxalign.commands.plan import _own_flags
from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.plan.assumed import AssumedData, absent
from jaxalign.plan.programs import _work
from jaxalign.plan.stages import stage_configs

CONFIG = """
from jaxalign.config import defaults
def get_config():
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = "w", {path!r}, ("nowhere.jsonl",)
    return c
"""


def said(capsys, *argv):
    assert main(["plan", *argv]) == 2
    return capsys.readouterr().err


def test_its_own_flags_and_the_rest():
    own, search, rest = _own_flags(
        ["dpo", "--on", "gpu:h200:1x8x1", "--assume=pool=0.9", "--assume", "launch=0", "--search=3", "--model=m"]
    )
    assert own["on"] == ["gpu:h200:1x8x1"]
    assert own["assume"] == ["pool=0.9", "launch=0"]
    assert search == 3
    assert rest == ["dpo", "--model=m"]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["dpo", "--model=m"], "--on=gpu"),
        (["--config=x.py", "--on=gpu:h200:8"], "gpu:KIND"),
        (["dpo", "--model=m", "--on="], "--on"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--search=none"], "--search=6"),
        (["dop", "--model=m", "--on=gpu:h200:1x8x1"], "jaxalign plan dpo"),
        (["--model=m", "--on=gpu:h200:1x8x1"], "jaxalign plan"),
    ],
)
def test_wrong_flags(argv, word, capsys, tmp_path):
    if "--config=x.py" in argv:
        (tmp_path / "x.py").write_text(CONFIG.format(path="m"))
        argv = [arg.replace("x.py", str(tmp_path / "x.py")) for arg in argv]
    assert word in said(capsys, *argv)


def test_an_unknown_machine_an_assumption_and_a_file(capsys, model):
    flags = ["sft", f"--model={model}"]
    assert "--on=gpu:h200:1x8x1" in said(capsys, *flags, "--on=gpu:h220:1x8x1")
    assert "--assume pool=" in said(capsys, *flags, "--on=gpu:h200:1x8x1", "--assume=pol=0.9")
    assert "nowhere.toml" in said(capsys, *flags, "--on=gpu:h200:1x8x1", "--machines=nowhere.toml")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compilers are here")
@pytest.mark.parametrize("machine", ["gpu:h200:1x8x1", "tpu:v5p:2x2x2"])
def test_a_missing_compiler_names_the_extra(machine, capsys, model):
    assert "[plan]" in said(capsys, "sft", f"--model={model}", f"--on={machine}")


def test_help_says_the_machines(capsys):
    assert main(["plan", "--help"]) == 0
    assert "gpu:h200:1x8x1" in capsys.readouterr().out


@pytest.fixture
def model(shared):
    return shared / "models" / "stories3m-llama"


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_assumed_data_fill_their_rows(algorithm):
    c = defaults(algorithm)
    c.data.sources, c.data.max_length, c.batch_size = ("owner/name",), 256, 4
    assert absent(c) == ["owner/name"]
    data = AssumedData(c)
    batch, sides = data.batch(0), 2 if algorithm in ("reward", "dpo") else 1
    length = 256 - c.rollout.max_new_tokens if algorithm == "ppo" else 256 * sides
    assert batch.rows.tokens.shape == (4, length)
    work = _work(batch.rows)
    assert work.tokens == 4 * length
    assert work.visible == pytest.approx((length + 1) / 2)


def test_packed_records_see_themselves_alone():
    c = defaults("sft")
    c.data.sources, c.data.max_length, c.data.row_length, c.batch_size = ("owner/name",), 128, 512, 2
    c.data.packing = True
    assert _work(AssumedData(c).batch(0).rows).visible == pytest.approx(129 / 2)


def test_a_stage_starts_from_what_an_earlier_one_will_write(model, tmp_path):
    from jaxalign.config import stages

    sft, dpo = defaults("sft"), defaults("dpo")
    sft.model.path, sft.data.sources, dpo.data.sources = str(model), ("a.jsonl",), ("b.jsonl",)
    dpo["from"].model = "sft"
    found = stage_configs(stages(str(tmp_path), sft=sft, dpo=dpo))
    assert found["dpo"].model.path == str(model)


def test_a_mesh_and_a_batch_that_do_not_divide(model):
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.plan.stages import _check_rows, _mesh

    c = defaults("sft")
    c.mesh.tensor = 3
    import jax

    with pytest.raises(InputError) as error:
        _mesh(c, jax.devices()[:1])
    assert "--config.mesh.tensor=1" in error.value.fix
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    c.batch_size, c.grad_accum_steps = 10, 4
    with pytest.raises(InputError) as error:
        _check_rows(c, mesh)
    assert error.value.fix in ("--config.batch_size=8", "--config.batch_size=12")
