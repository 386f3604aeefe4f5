"""Bytes of trees on a device, and the limit that all processes decide by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel import device_memory
from jaxalign.parallel.device_memory import device_bytes, device_limit, num_bytes, repeated_bytes
from jaxalign.parallel.host_memory import HOST
from jaxalign.parallel.mesh import make_mesh


def test_what_trees_share_counts_once():
    base = {"embed": jnp.zeros((4, 3)), "norm": jnp.zeros(3, jnp.bfloat16)}
    trees = {"policy": base | {"head": jnp.zeros(5)}, "ref": base}
    assert num_bytes(trees) == device_bytes(trees) == 4 * 12 + 2 * 3 + 4 * 5
    assert num_bytes(jax.eval_shape(lambda: (base, base))) == 2 * num_bytes(base)
    assert repeated_bytes(trees) == 4 * 12 + 2 * 3 and repeated_bytes(base) == 0


def test_a_device_holds_its_part_and_not_what_waits_in_the_host():
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    array = lambda sharding: jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)  # noqa: E731
    tree = [array(split), array(whole), array(split.with_memory_kind(HOST))]
    assert device_bytes(tree) == 16 + 32 and num_bytes(tree) == 3 * 32


@pytest.fixture
def limits(monkeypatch):
    """Sets what each process may use; the first is this one."""

    def of(*bytes_of_each):
        device_memory._least_limit.cache_clear()
        monkeypatch.setattr(device_memory, "own_limit", lambda: bytes_of_each[0])
        monkeypatch.setattr(jax, "process_count", lambda: len(bytes_of_each))
        gathered = None if None in bytes_of_each else np.int32([b >> 20 for b in bytes_of_each])
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: gathered)

    yield of
    device_memory._least_limit.cache_clear()


def test_all_processes_take_the_least_limit(limits):
    limits(80 << 30, 79 << 30)
    assert device_limit() == 79 << 30 == device_limit(make_mesh({}, jax.devices()[:1]))
    limits(5 << 20)
    assert device_limit() == 5 << 20
    limits(None, None)
    assert device_limit() is None
