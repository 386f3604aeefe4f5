"""Trackers get a run's figures under its name and tags; a missing package is told before anything is loaded."""

import sys
import types
from types import SimpleNamespace

import pytest

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.pipeline.overrides import override
from jaxalign.ranges import TRACKERS as NAMES
from jaxalign.train import trainer
from jaxalign.train.metrics import Writer, read_metrics
from jaxalign.train.rundir import RunDir
from jaxalign.train.trackers import TRACKERS


def make(tmp_path, *trackers, **fields):
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = str(tmp_path / "run"), "m", ("d",)
    c.logging.trackers = trackers
    for name, value in fields.items():
        c.logging[name] = value
    return c


def written(c, start=0):
    """Two rows written by a run; what was written before is there."""
    run = RunDir(c.workdir)
    run.path.mkdir(exist_ok=True)
    writer = Writer(run, c.logging, start=start, config={"model": {"path": "m"}, "seed": 0})
    writer.write(start + 1, {"loss": 1.0, "rewards/margins": float("nan")})
    writer.close()
    return run


@pytest.fixture
def wandb(monkeypatch):
    seen = SimpleNamespace(rows=[], begun=[], finished=0)

    def init(**options):
        seen.begun.append(options)

        def finish():
            seen.finished += 1

        return SimpleNamespace(log=lambda values, step: seen.rows.append((step, values)), finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", fake := types.ModuleType("wandb"))
    fake.init = init
    return seen


@pytest.fixture
def mlflow(monkeypatch):
    seen = SimpleNamespace(rows=[], calls=[])
    monkeypatch.setitem(sys.modules, "mlflow", fake := types.ModuleType("mlflow"))

    def start_run(**options):
        seen.calls.append(("start_run", options))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    fake.start_run = start_run
    fake.log_metrics = lambda values, step: seen.rows.append((step, values))
    for name in ("set_experiment", "set_tags", "log_params", "end_run"):
        setattr(fake, name, lambda *given, name=name: seen.calls.append((name, *given)))
    return seen


def test_the_names_are_those_that_a_configuration_takes():
    assert set(TRACKERS) == set(NAMES)


def test_all_at_once(tmp_path, wandb, mlflow):
    c = make(tmp_path, "tensorboard", "wandb", "mlflow", run_name="first", tags=("a", "b"), project="p")
    run = written(c)
    assert wandb.rows == mlflow.rows == [(1, {"loss": 1.0})]  # what is no number is left out
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["tags"], wandb.finished) == ("p", "first", ["a", "b"], 1)
    calls = dict(call for call in mlflow.calls if len(call) == 2)
    assert calls["set_experiment"] == "p" and calls["start_run"] == {"run_name": "first"}
    assert calls["set_tags"] == {"a": "true", "b": "true"} and calls["log_params"]["model.path"] == "m"
    assert list(run.events.iterdir()) and len(read_metrics(run)) == 1


def test_a_resumed_run_continues_its_curves(tmp_path, wandb, mlflow):
    c = make(tmp_path, "wandb", "mlflow")
    written(c)
    written(c, start=1)
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"] and wandb.begun[0]["name"] == c.workdir
    assert mlflow.calls[-2] == ("start_run", {"run_id": "r1"})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'jaxalign\[{name}\]'") as error:
        trainer.run(make(tmp_path, "tensorboard", name))
    assert "logging.trackers=tensorboard" in error.value.fix and not (tmp_path / "run").exists()


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(InputError, match="wandb"):
        validate(make(tmp_path, "wandbb"))
    with pytest.raises(InputError, match="tags"):
        validate(make(tmp_path, tags=(3,)))


@pytest.mark.parametrize(
    "field, value, fix",
    [
        ("logging.wandb_project", "mine", "logging.project=mine"),
        ("logging.tensorboard", "true", "logging.trackers=tensorboard"),
        ("logging.tensorboard", "false", "logging.trackers=None"),
        ("report_to", "wandb", "logging.trackers=wandb"),
        ("wandb_name", "x", "logging.run_name=x"),
    ],
)
def test_earlier_and_foreign_names_are_told_the_new_one(field, value, fix):
    with pytest.raises(InputError) as error:
        override(defaults("dpo"), field, value)
    assert fix in error.value.fix
