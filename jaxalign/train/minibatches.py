"""Rows in parts: minibatches in a random order, micro-batches one after the other, and the keys of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.errors import InputError
from jaxalign.parallel.mesh import batch_shards
from jaxalign.types import Array


def check_rows(config: Any, mesh: Mesh) -> None:
    """Refuses a batch that minibatches, micro-batches and the mesh do not divide, with the nearest that they do.

    Args:
      config: of the stage.
      mesh: that it runs on; its devices need not be there.
    """
    rows, minibatches, accumulation = (
        config.batch_size,
        config.algorithm.get("num_minibatches", 1),
        config.grad_accum_steps,
    )
    parts = minibatches * accumulation * batch_shards(mesh)
    if rows % parts:
        raise InputError(
            f"batch_size {rows} in {f'{minibatches} minibatches of ' if minibatches > 1 else ''}{accumulation} "
            f"micro-batches on {batch_shards(mesh)} batch shards (data x fsdp)",
            f"a multiple of {parts}",
            f"--config.batch_size={max(round(rows / parts), 1) * parts}",
        )


def stream_key(seed: int, iteration: Array, use: int) -> Array:
    """The random key of one use (0 the rollout, 1 + e the order of epoch e) in one iteration."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), iteration), use)


def shuffle_minibatches(key: Array, worth: Array, count: int, together: int = 1) -> list[Array]:
    """Row numbers of `count` minibatches: a random order dealt out in turn, rows of the greatest worth first.

    So each minibatch gets its share of the rows with something to learn from: none is empty where there are enough.

    Args:
      key: of the order.
      worth: bool or int [N], of each group of neighbouring rows: 0 for padding, more for a prompt, most for one that
        something is learned from.
      count: of minibatches.
      together: rows of a group, which stay neighbours.
    """
    order = jax.random.permutation(key, worth.shape[0])
    order = order[jnp.argsort(-worth[order].astype(jnp.int32), stable=True)]
    dealt = [order[i::count] for i in range(count)]
    return [(one[:, None] * together + jnp.arange(together)).reshape(-1) for one in dealt]


def in_parts(function: Callable, tree: Any, count: int) -> Any:
    """function over `count` interleaved parts of the rows, one after the other; rows come back in order.

    Part i holds the rows b with b % count == i: on a batch-sharded mesh nothing moves between devices.
    """
    if count == 1:
        return function(tree)
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), tree)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(function, split))
