"""One layer of a parameter on the host, gathered from all processes where it is sharded over them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.models.hf_names import Index
from jaxalign.models.stacks import Stacked


def on_host(leaf: Any, index: Index = ()) -> np.ndarray:
    """What a parameter has at an index of its first dims; every process calls it, in the same order.

    Args:
      leaf: an array, sharded or not; or in several stacks, with an index.
      index: of a layer, or of a layer and an expert; () is all of it.
    """
    if isinstance(leaf, Stacked):
        leaf, own = leaf.at(index[0])
        index = (own, *index[1:])
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding)
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        leaf = _whole_at(whole)(leaf, index)
    elif index:
        leaf = leaf[index]
    return np.asarray(leaf)


@functools.cache
def _whole_at(sharding):
    def at(x, index):
        for i in index:
            x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x

    return jax.jit(at, out_shardings=sharding)
