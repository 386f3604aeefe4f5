"""model.remat=auto: the fastest policy that fits, said, noted, and kept to by a run that resumes."""

import functools
import json

import jax
import pytest
from run_child import make_config, stories

from jaxalign import config as configuration
from jaxalign.errors import InputError
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.train import compiled, trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.remat import FASTEST_FIRST, noted, settle_remat
from jaxalign.train.rundir import RunDir
from jaxalign.train.stage import Stage

FIELDS = {
    "model.remat": "auto", "num_train_steps": 2, "checkpoint.every": 0, "data.max_length": 128, "batch_size": 4,
    "optimizer.schedule": "constant",
}  # fmt: skip


def run(shared, workdir, algorithm="sft", devices=1, **fields):
    config = make_config(stories(shared, workdir, algorithm, **FIELDS | fields))
    return trainer.run(config, devices=jax.devices()[:devices])


def settled(workdir):
    return json.loads((workdir / "config.json").read_text())["settled"]["remat"]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def stage(shared, tmp_path):
    """One whose steps are compiled once for each policy."""
    config = configuration.validated(make_config(stories(shared, tmp_path, "sft", **FIELDS))).config
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = Stage(config, mesh, RunDir(str(tmp_path)))
        made.step_with = functools.lru_cache(made.step_with)
        yield made


def test_the_fastest_that_fits(stage, capsys, monkeypatch):
    settle_remat(stage, None)
    assert stage.remat == "none"  # where nothing is said of memory
    sizes = {}
    for policy in FASTEST_FIRST:
        stage.step_with(policy).compile(*step_arguments(stage))
        sizes[policy] = stage.step_with(policy).memory["total"]
    dots, attention, full = sizes.values()
    assert dots > attention > full
    for policy, room in (("dots", dots / 0.9), ("attention", dots), ("full", attention)):
        settle_remat(stage, room)
        assert stage.remat == policy and stage.step is stage.step_with(policy)
        assert f"model.remat=auto: {policy}" in capsys.readouterr().err
    settle_remat(stage, 2**40, {**noted(stage), "remat": "attention"})
    assert stage.remat == "attention"  # it began with that
    settle_remat(stage, 2**40, {"remat": "attention", "machine": "8 x another"})
    assert stage.remat == "dots"

    monkeypatch.setattr(compiled, "device_limit", lambda: 1000)
    stage.step_with = type(stage).step_with.__get__(stage)
    with pytest.raises(InputError, match="out of memory in the train step"):
        settle_remat(stage, 1000)


def test_a_run_that_resumes_keeps_to_it(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "device_limit", lambda: 1)  # nothing fits: what is left to try is taken, and said
    results = run(shared, tmp_path / "run")
    assert settled(tmp_path / "run") == "full" and results["num_compiles"] == 1
    monkeypatch.setattr(trainer, "device_limit", lambda: 2**40)
    run(shared, tmp_path / "run", num_train_steps=3)
    assert settled(tmp_path / "run") == "full"
    run(shared, tmp_path / "named", num_train_steps=3, **{"model.remat": "full"})
    assert losses(tmp_path / "run") == losses(tmp_path / "named")


def test_of_two_models_on_a_mesh(shared, tmp_path, monkeypatch):
    """The program that was compiled to see whether it fits is the one that trains."""
    monkeypatch.setattr(trainer, "device_limit", lambda: 2**40)
    small = {"data.max_length": None, "rollout.max_new_tokens": 8, "rollout.num_slots": None}
    results = run(shared, tmp_path, "ppo", 2, num_train_steps=1, **small)
    assert settled(tmp_path) == "dots" and results["num_compiles"] == 1


def test_frozen_models_that_the_step_does_not_read_are_counted(shared, tmp_path, capsys):
    """PPO's reference lies on the devices while the step runs, and is none of the step's arguments."""
    small = {"data.max_length": None, "rollout.max_new_tokens": 8}
    config = configuration.validated(make_config(stories(shared, tmp_path, "ppo", **FIELDS | small))).config
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = Stage(config, mesh, RunDir(str(tmp_path)))
        made = stage.step_with = functools.lru_cache(stage.step_with)
        step = made("dots")
        step.compile(*step_arguments(stage))
        frozen = num_bytes(stage.program.frozen["ref"].abstract())
        settle_remat(stage, int((step.memory["total"] + frozen / 2) / 0.95))
        assert stage.remat != "dots"
        settle_remat(stage, int((step.memory["total"] + 2 * frozen) / 0.95))
        assert stage.remat == "dots"
