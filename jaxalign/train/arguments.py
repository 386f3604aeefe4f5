"""Shapes and shardings of what a stage's programs are called with: enough to compile them, for any devices."""

from __future__ import annotations

from typing import Any

import jax

from jaxalign.parallel.sharding import batch_part, batch_sharding, param_shardings
from jaxalign.train.checkpoints import abstract
from jaxalign.train.models import Role, shared
from jaxalign.train.stage import Stage
from jaxalign.types import Batch, Params


def step_arguments(stage: Stage) -> tuple[Any, dict[str, Params], Any]:
    """Of the train step: state, frozen parameters, batch."""
    return stage.like, frozen_parameters(stage), stage.program.stepped(batch_of(stage, stage.dataset))


def frozen_parameters(stage: Stage) -> dict[str, Params]:
    """By role, on the devices; those of one source are the same objects, as the arrays are."""

    def shapes(name: str, role: Role) -> Params:
        tree = role.abstract()
        return abstract(tree, param_shardings(stage.mesh, tree))

    return shared(stage.program.frozen, shapes)


def batch_of(stage: Stage, dataset: Any) -> Batch:
    """A batch as it comes from data.

    Args:
      stage: whose mesh it is split over.
      dataset: to train on, or held out.
    """
    sharding, part = batch_sharding(stage.mesh), batch_part(stage.mesh)

    def of_all_processes(x):
        return jax.ShapeDtypeStruct((x.shape[0] * part[1], *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(of_all_processes, dataset.batch(0, *part))


def widest_prompts(stage: Stage) -> Batch:
    """A batch of prompts of the greatest width."""
    batch, width = batch_of(stage, stage.dataset), stage.dataset.shape.length

    def wide(x):
        return jax.ShapeDtypeStruct((x.shape[0], width), x.dtype, sharding=x.sharding)

    return batch._replace(rows=jax.tree.map(wide, batch.rows))
