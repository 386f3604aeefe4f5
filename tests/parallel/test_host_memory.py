"""The host's memory as a place for arrays, and what is said where there is none."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.errors import InputError
from jaxalign.parallel.host_memory import DEVICE, HOST, in_memory, require_host_memory
from jaxalign.parallel.mesh import make_mesh


def bytes_in(tree, kind):
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.sharding.memory_kind == kind)


def test_arrays_go_there_and_come_back_as_they_were():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    require_host_memory(mesh, "field", "instead")
    split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    tree = {"a": jax.device_put(jnp.arange(64.0).reshape(8, 8), split), "b": jax.device_put(jnp.ones(3))}
    there = in_memory(tree, HOST)
    assert (bytes_in(there, HOST), bytes_in(there, DEVICE), bytes_in(tree, DEVICE)) == (268, 0, 268)
    assert there["a"].sharding.spec == split.spec
    back = in_memory(there, DEVICE)
    assert back["a"].sharding == split and bytes_in(back, DEVICE) == 268
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_a_platform_without_it_is_refused_in_words():
    device = types.SimpleNamespace(
        device_kind="Toaster", addressable_memories=lambda: [types.SimpleNamespace(kind="device")]
    )
    mesh = types.SimpleNamespace(devices=np.array([[[device]]]))
    with pytest.raises(InputError, match="remat='offload' on Toaster, whose memories are device") as told:
        require_host_memory(mesh, "model.remat='offload'", "--config.model.remat=full")
    assert "a platform with pinned_host memory" in str(told.value) and "model.remat=full" in str(told.value)
