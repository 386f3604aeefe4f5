"""The memory of a device: what programs may use of it, and what arrays take there."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.parallel.host_memory import HOST


def device_limit(mesh: Mesh | None = None) -> int | None:
    """Bytes that programs may use on each device, the least of all processes, so that all of them decide alike.

    All processes make the first call together.

    Args:
      mesh: whose devices are meant; None: those of the ambient mesh, or the default one.

    Returns:
      None where the runtime does not say (CPU), and for devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device if mesh is None else mesh.devices.flat[0]
    if getattr(device, "platform", None) not in (None, jax.default_backend()):
        return None
    return _least_limit()


@functools.cache
def _least_limit() -> int | None:
    from jax.experimental import multihost_utils

    limit = own_limit()
    if limit is None or jax.process_count() == 1:
        return limit
    return int(multihost_utils.process_allgather(np.int32(limit >> 20)).min()) << 20


def own_limit() -> int | None:
    """Bytes that programs may use on this process's first device; None where the runtime does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays in each device's own memory; not of those that wait in the host's.

    Args:
      tree: arrays or ShapeDtypeStructs; one that is there several times counts once.
    """
    return sum(map(_on_device, _each(tree)))


def repeated_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays that are in it again, in each device's own memory.

    A compiler counts an argument that is given twice, such as the base that a policy and its reference share, twice.

    Args:
      tree: arrays or ShapeDtypeStructs.
    """
    return sum(map(_on_device, jax.tree.leaves(tree))) - device_bytes(tree)


def _on_device(x: Any) -> int:
    sharding = getattr(x, "sharding", None)
    if sharding is not None and sharding.memory_kind == HOST:
        return 0
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def num_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, however many devices they are split or copied over.

    Args:
      tree: arrays or ShapeDtypeStructs; one that is there several times counts once.

    >>> shared = np.zeros(2, np.float32)
    >>> num_bytes({"policy": shared, "ref": shared})
    8
    """
    return sum(x.size * x.dtype.itemsize for x in _each(tree))


def _each(tree: Any) -> Iterable[Any]:
    return {id(x): x for x in jax.tree.leaves(tree)}.values()
