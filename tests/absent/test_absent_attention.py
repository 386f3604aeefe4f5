"""The attention kernels compiled ahead of time for target accelerators, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.ops.attention import attention, choose_backend
from jaxalign.parallel.mesh import AXES
from jaxalign.plan import machines

CASES = [
    ("tpu:v5e:2x2", "splash"),
    ("tpu:v5p:2x2x1", "splash"),
    ("gpu:h200:1x4x1", "triton"),
    ("gpu:h200:1x4x1", "mosaic"),  # where it is asked for
]
NAMES = {"splash": "splash_mha_dkv", "triton": "triton", "mosaic": "mosaic_gpu"}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("machine, backend", CASES)
def test_compiles_without_squares(machine, backend, head_dim):
    """Two rows of 8,192 tokens a device, 8 query and 2 key heads: less memory than one head's scores would take."""
    devices, T = machines.absent_devices(machine), 8192
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=rows)

    q, k = shape(4, T, 16, head_dim), shape(4, T, 4, head_dim)
    start = shape(4, T, dtype=jnp.int32)

    def gradients(q, k, v, start, end):
        chosen = choose_backend(q.shape[1], k.shape[1], q.dtype)
        assert chosen == backend or (backend, chosen) == ("mosaic", "triton")
        run = functools.partial(attention, start_BT=start, end_BT=end, backend=backend)
        out, back = jax.vjp(run, q, k, v)
        return out, *back(out)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(q, k, k, start, start).compile()
    assert NAMES[backend] in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * T * T
