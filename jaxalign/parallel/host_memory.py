"""Offloading arrays to pinned host memory."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.errors import InputError

HOST, DEVICE = "pinned_host", "device"  # JAX's names


def require_host_memory(mesh: Mesh, field: str, instead: str) -> None:
    """Refuses offloading where the devices have no pinned host memory.

    Args:
      mesh: of the run.
      field: the configuration's field and value that ask for it.
      instead: a flag that does without.

    Raises:
      InputError: naming the memories that there are.
    """
    device: Any = mesh.devices.flat[0]
    found = sorted({memory.kind for memory in device.addressable_memories()})
    if found and HOST not in found:  # of the GPUs of a target topology nothing is known
        raise InputError(
            f"{field} on {device.device_kind}, whose memories are {', '.join(found)}",
            f"a platform with {HOST} memory",
            instead,
        )


def in_memory(tree: Any, kind: str) -> Any:
    """The tree with every array in the given memory kind, copied where it is in another; shardings stay.

    Args:
      tree: arrays; numpy's, which are on no device, stay as they are.
      kind: `HOST` or `DEVICE`.
    """

    def put(x):
        if not isinstance(x, jax.Array) or x.sharding.memory_kind == kind:
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


def moved(tree: Any, kind: str) -> Any:
    """`in_memory` that deletes the source of every copied array.

    A checkpoint in the making is not disturbed: it has numpy views, and memory under a view is not given back.

    Args:
      tree: arrays; taken over.
      kind: `HOST` or `DEVICE`.
    """
    there = in_memory(tree, kind)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(there), strict=True):
        if old is not new:
            old.delete()
    return there
