"""Global arrays as numpy on the host: a process's own rows, or the rows of all."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.types import Array


def local_rows(array: Array) -> np.ndarray:
    """The rows of a global array that lie on this process's devices, in order; waits for them.

    The inverse of `put_batch`.  Copies of the same rows (a `tensor` axis) count once.

    Args:
      array: [B, ...], split over rows or replicated.

    Returns:
      [B of this process, ...].
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def all_rows(array: Array) -> np.ndarray:
    """All rows of a global array, on every process; waits for them.

    Args:
      array: [B, ...], split over rows or replicated.

    Returns:
      [B, ...].
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
