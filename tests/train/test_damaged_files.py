"""Side files of a run that are damaged: made again, recovered, or refused with advice that works."""

import json

import jax.numpy as jnp
import pytest

from jaxalign.config import defaults, to_dict
from jaxalign.errors import InputError
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.metrics import Writer, cut_back, read_metrics
from jaxalign.train.rundir import DAMAGED, RunDir, results
from jaxalign.types import TrainState


@pytest.fixture
def config(tmp_path):
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = str(tmp_path / "run"), "m", ("a",)
    c.logging.trackers = ()
    return c


def opened(config):
    """As the trainer does: what is there is compared, then the run begins."""
    run = RunDir(config.workdir)
    done = run.open(to_dict(config), resume=True)
    if done is None:
        run.begin(to_dict(config))
    return done


def trained(config, *, checkpoint=True):
    """A directory in which this configuration was trained for two steps."""
    run = RunDir(config.workdir)
    assert opened(config) is None
    writer = Writer(run, config.logging, start=0, config={})
    for step in (1, 2):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    if checkpoint:
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        state = TrainState(jnp.int32(2), {"policy": jnp.ones(3)}, {}, {}, jnp.int32(2))
        checkpoints.save(2, state, {"config": to_dict(config), "step": 2}, {}, checkpoints.checked(2, state))
        checkpoints.close()
    return run


FOREIGN = [
    b"\xff\xfe\x00 no text\n", b"[1, 2]\n", b"7\n", b'{"loss": 1.0}\n', b'{"step": "two"}\n', b'{"step": true}\n',
    b"\n", b"[" * 100_000 + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_lines_among_the_figures_are_put_aside(config, foreign, capsys):
    run = trained(config, checkpoint=False)
    whole = run.metrics.read_bytes()
    first, second = whole.splitlines(keepends=True)
    run.metrics.write_bytes(first + foreign + second)
    assert [row["step"] for row in read_metrics(run)] == [1, 2] and not run.untrained()
    writer = Writer(run, config.logging, start=2, config={})
    writer.close()
    assert run.metrics.read_bytes() == whole
    assert (run.path / DAMAGED).read_bytes() == first + foreign + second
    assert "1 lines" in capsys.readouterr().err
    assert opened(config) is None  # the copy is the run's own


def test_a_line_that_a_crash_cut_short_is_no_damage(config, capsys):
    run = trained(config, checkpoint=False)
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 3, "lo')
    cut_back(run, 2)
    assert len(read_metrics(run)) == 2 and not (run.path / DAMAGED).exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("text", [None, "", "{", '{"config": ', "\x00\x00"])
def test_a_damaged_configuration_is_made_again_from_a_checkpoint(config, text, capsys):
    run = trained(config)
    path, before = run.path / "config.json", (run.path / "config.json").read_text()
    path.unlink()
    if text is not None:
        path.write_text(text)
    changed = to_dict(config) | {"batch_size": 2}
    with pytest.raises(InputError, match=r"batch_size \(was 64, is 2\)"):  # it is still compared
        RunDir(config.workdir).open(changed, resume=True)
    assert opened(config) is None
    assert path.read_text() == before and "checkpoint 2" in capsys.readouterr().err


def test_without_a_checkpoint_a_damaged_configuration_is_removed_as_advised(config):
    run = trained(config, checkpoint=False)
    path = run.path / "config.json"
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read") as error:
        RunDir(config.workdir).open(to_dict(config), resume=True)
    assert "remove that file" in error.value.fix
    path.unlink()
    assert opened(config) is None
    assert json.loads(path.read_text())["config"]["batch_size"] == 64


def test_the_figures_of_an_end_are_found_again():
    from jaxalign.train.trainer import last_figures

    rows = [
        {"step": 1, "time": 0, "loss": 3.0},
        {"step": 2, "time": 0, "loss": 2.0},
        {"step": 2, "time": 0, "eval/loss": 4.0},
    ]
    assert last_figures(rows) == {"metrics": {"loss": 2.0}, "eval": {"eval/loss": 4.0}}
    assert last_figures([]) == {"metrics": {}, "eval": {}}


@pytest.mark.parametrize("text", ["{}", "", "[]", "{", "null", '"done"'])
def test_an_end_that_says_nothing_is_no_end(config, text):
    run = trained(config)
    (run.path / "DONE").write_text(text)
    assert results(run.path) is None
    assert opened(config) is None  # it goes on, and writes it anew
    run.write_json("DONE", {"steps": 2})
    assert opened(config) == {"steps": 2}
