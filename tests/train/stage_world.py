"""Stages of small runs, made without running anything, and what the directories of runs hold."""

import json

import jax
from safetensors.numpy import load_file

from jaxalign.parallel.mesh import make_mesh
from jaxalign.train import trainer
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.rundir import RunDir


def stage_of(config, devices=1):
    """The stage of a configuration, parameters over so many devices."""
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:devices])
    return trainer.Stage(config, mesh, RunDir(config.workdir))


def state_of(stage, step):
    """That of a checkpoint."""
    checkpoints = Checkpoints(stage.directory.checkpoints, keep=2)
    try:
        return checkpoints.restore(step, stage.like)[0]
    finally:
        checkpoints.close()


def rows(directory):
    """The metrics of a run, step by step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def tensors(directory):
    """Those of a model's or an export's files, by name."""
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}
