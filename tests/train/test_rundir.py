"""What a run directory accepts, and its figures after a crash."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxalign.config import defaults, to_dict
from jaxalign.errors import InputError
from jaxalign.pipeline.keys import keys_of
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.metrics import Writer, cut_back, read_metrics
from jaxalign.train.rundir import FORMAT, RunDir
from jaxalign.types import TrainState


def make(tmp_path, **fields):
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = str(tmp_path / "run"), "m", ("a",)
    c.logging.trackers = ()
    for name, value in fields.items():
        *parents, leaf = name.split("__")
        node = c
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return c


def open_run(c, resume=True, step=1):
    """Opens, and trains as far as one row of figures."""
    found = RunDir(c.workdir).open(to_dict(c), resume=resume)
    if step and found is None:
        RunDir(c.workdir).metrics.write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
    return found


def test_same_configuration_goes_on_another_is_refused(tmp_path):
    c = make(tmp_path)
    assert open_run(c) is None and open_run(c) is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["format"] == FORMAT
    with pytest.raises(InputError, match=r"optimizer.learning_rate \(was 2e-05, is 0.1\)"):
        open_run(make(tmp_path, optimizer__learning_rate=0.1))
    with pytest.raises(InputError, match="batch_size"):
        open_run(make(tmp_path, batch_size=2))
    # what does not change the numbers may change
    assert open_run(make(tmp_path, mesh__data=2, logging__every=7, checkpoint__every=9, model__remat="none")) is None


def test_a_run_that_patience_ended_continues_with_another_patience(tmp_path):
    c = make(tmp_path, checkpoint__patience=2)
    open_run(c)
    (tmp_path / "run" / "DONE").write_text(json.dumps({"steps": 4, "stopped_early": True}))
    assert open_run(c)["steps"] == 4
    assert open_run(make(tmp_path, checkpoint__patience=5)) is None


def test_fields_that_were_added_later_are_no_other_run(tmp_path):
    """A run or a finished stage of an earlier version, whose configuration had fewer fields."""
    c = make(tmp_path)
    new = defaults("ppo")
    new.workdir, new.model.path, new.data.sources = c.workdir, "m", ("a",)
    old = new.copy_and_resolve_references()
    with old.unlocked():
        del old.checkpoint.patience, old.checkpoint.every_minutes, old.algorithm.estimator
        del old.data.chat_template_kwargs
    assert keys_of(old, {}, ()) == keys_of(new, {}, ())
    open_run(old)
    assert open_run(new) is None
    new.algorithm.estimator = "mine.py:own"
    assert keys_of(old, {}, ()) != keys_of(new, {}, ())
    with pytest.raises(InputError, match="estimator"):
        open_run(new)


@pytest.mark.parametrize("left", ["config", "empty folders"])
def test_a_run_that_failed_before_its_first_step_is_taken_over(tmp_path, left):
    open_run(make(tmp_path, model__path="wrong"), step=0)
    if left == "empty folders":
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert open_run(make(tmp_path), step=0) is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["model"]["path"] == "m"


@pytest.mark.parametrize("left", ["checkpoints/2", "DONE", "metrics.jsonl"])
def test_what_was_trained_is_not_taken_over(tmp_path, left):
    open_run(make(tmp_path), step=0)
    path = tmp_path / "run" / left
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="another configuration") as error:
        open_run(make(tmp_path, batch_size=2))
    assert f"workdir={tmp_path / 'run-2'}" in error.value.fix and f"remove {tmp_path / 'run'} " in error.value.fix


@pytest.mark.parametrize("workdir", ["/sys/foo", "/proc/foo", "file/x", "file"])
def test_a_workdir_that_cannot_be_is_input(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be made and written to") as error:
        RunDir(workdir).open({}, resume=True)
    assert error.value.found.startswith(str(tmp_path / workdir)) and "runs/NAME" in error.value.fix


def test_a_folder_of_something_else_is_refused(tmp_path):
    c = make(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").write_text("")  # what the command prints may go there
    (run / ".hidden").write_text("")
    (run / "cache").mkdir()  # of a dry run
    RunDir(c.workdir).make()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no run has written: thesis\.txt"):
        open_run(c)
    assert not (run / "config.json").exists()
    (run / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')  # a model's directory
    with pytest.raises(InputError, match=r"config\.json is not a run's"):
        open_run(c)
    (run / "config.json").write_text("not JSON")
    with pytest.raises(InputError, match="cannot be read"):
        open_run(c)


def test_checkpoints_take_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("run/checkpoints"), keep=1)
    state = TrainState(jnp.int32(1), {"policy": jnp.ones(3)}, {}, {}, jnp.int32(1))
    checkpoints.save(1, state, {}, {}, checkpoints.checked(1, state))
    checkpoints.close()
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_length_may_change_under_a_constant_rate_only(tmp_path):
    open_run(make(tmp_path))
    with pytest.raises(InputError, match="num_epochs") as error:
        open_run(make(tmp_path, num_epochs=2))
    assert "schedule of the learning rate depends" in error.value.expected and "remove" in error.value.fix
    other = tmp_path / "constant"
    open_run(make(other, optimizer__schedule="constant"))
    RunDir(str(other / "run")).write_json("DONE", {"steps": 3})
    assert open_run(make(other, optimizer__schedule="constant")) == {"steps": 3}
    longer = make(other, optimizer__schedule="constant", num_epochs=2)
    assert open_run(longer) is None
    assert (other / "run" / "DONE").exists()  # until it is known that the run can go on
    RunDir(longer.workdir).begin(to_dict(longer))
    assert not (other / "run" / "DONE").exists()


def test_another_format_and_foreign_checkpoints_are_refused(tmp_path):
    c = make(tmp_path)
    open_run(c)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        open_run(c)
    path.unlink()
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="no config"):
        open_run(c)


def test_resume_can_be_forbidden(tmp_path):
    c = make(tmp_path)
    open_run(c)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match="resume=True"):
        open_run(c, resume=False)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    c = make(tmp_path)
    run = RunDir(c.workdir)
    writer = Writer(run, c.logging, start=0, config={})
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 / step})
    writer.write(3, {"eval/loss": float("nan")})
    writer.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a row
    writer = Writer(run, c.logging, start=3, config={})
    writer.write(4, {"loss": 7.0})
    writer.close()
    rows = read_metrics(run)
    assert [r["step"] for r in rows] == [1, 2, 3, 3, 4]
    assert rows[3]["eval/loss"] is None and rows[-1]["loss"] == 7.0
    cut_back(run, 0)
    assert read_metrics(run) == []


def test_tensorboard_events_are_written(tmp_path):
    c = make(tmp_path, logging__trackers=("tensorboard",))
    run = RunDir(c.workdir)
    writer = Writer(run, c.logging, start=0, config={})
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list((tmp_path / "run" / "events").iterdir())


def test_workdir_in_an_object_store(tmp_path, store):
    c = make(tmp_path)
    c.workdir = "s3://bucket/run"
    assert open_run(c, step=0) is None
    run = RunDir(c.workdir)
    writer = Writer(run, c.logging, start=0, config={})
    writer.write(1, {"loss": 1.0})
    writer.flush()
    writer.write(2, {"loss": 2.0})
    writer.close()
    writer = Writer(run, c.logging, start=1, config={})
    writer.write(2, {"loss": 3.0})
    writer.close()
    assert [r["loss"] for r in read_metrics(run)] == [1.0, 3.0]
    run.write_json("DONE", {"steps": 2, "nan": float("nan")})
    assert open_run(c) == {"steps": 2, "nan": None}
    assert store.store  # it really went there


def test_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    c = make(tmp_path, logging__trackers=("wandb",))
    with pytest.raises(InputError, match=r"pip install .*wandb"):
        Writer(RunDir(c.workdir), c.logging, start=0, config={})
