"""The options of jaxalign.parallel.compiler_options, in programs for accelerators that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel import compiler_options as options
from jaxalign.parallel.mesh import AXES
from jaxalign.plan import machines
from jaxalign.plan.account import account

LAYERS, D, F, ROWS = 8, 1024, 4096, 2048


def on_fsdp(machine):
    """Devices that are not there, their mesh, and how stacked weights and rows are split over it."""
    devices = machines.absent_devices(machine)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, -1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    split, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ("fsdp",)))
    return devices, mesh, split, rows


def forward(layers, x):
    """Layers whose weights are split over the devices, gathered in the loop."""

    def body(x, layer):
        gathered = [jax.lax.with_sharding_constraint(w, PartitionSpec()) for w in layer]
        return x + jax.nn.silu(x @ gathered[0]) @ gathered[1], None

    return jax.lax.scan(body, x, layers)[0]


def loss(layers, x):
    return forward(layers, x).astype(jnp.float32).sum()


@pytest.mark.parametrize("machine", ["tpu:v5p:2x2x1", "tpu:v6e:2x2"])
def test_a_tpu_gathers_beside_its_products(machine):
    devices, mesh, split, rows = on_fsdp(machine)
    shape = jax.ShapeDtypeStruct
    layers = [shape((LAYERS, *dims), jnp.bfloat16, sharding=split) for dims in ((D, F), (F, D))]
    x = shape((ROWS * len(devices), D), jnp.bfloat16, sharding=rows)

    with jax.set_mesh(mesh):
        compiled = options.jit(forward).lower(layers, x).compile()
    found = [c for c in account(compiled.as_text()).collectives if "all-gather" in (c.kind, c.piece_of) and c.loop]
    print(machine, [c.asynchronous for c in found])
    assert any(c.asynchronous for c in found)


def test_a_torus_of_three_axes_gathers():
    """Without the option each device's part is summed with zeros, twice the bytes, and nothing runs beside it."""
    devices, mesh, split, rows = on_fsdp("tpu:v5p:4x4x4")
    layers = [jax.ShapeDtypeStruct((LAYERS, *dims), jnp.bfloat16, sharding=split) for dims in ((8192, F), (F, 8192))]
    x = jax.ShapeDtypeStruct((ROWS * len(devices), 8192), jnp.bfloat16, sharding=rows)
    with jax.set_mesh(mesh):
        compiled = options.jit(forward).lower(layers, x).compile()
    found = {c.kind for c in account(compiled.as_text()).collectives if c.loop}
    print(found)
    assert "all-gather" in found and "all-reduce" not in found


def test_sparse_cores_sum_gradients():
    """Of one layer while those of the next are made; elsewhere only a train step is compiled with the option."""
    devices, mesh, split, rows = on_fsdp("tpu:v6e:2x4")
    layers = [jax.ShapeDtypeStruct((LAYERS, *dims), jnp.bfloat16, sharding=split) for dims in ((D, F), (F, D))]
    x = jax.ShapeDtypeStruct((ROWS * len(devices), D), jnp.bfloat16, sharding=rows)

    with jax.set_mesh(mesh):
        given = options.compiler_options(update=True, tokens=2**14)
        assert given.keys() > options.compiler_options(tokens=2**14).keys()
        step = jax.jit(jax.grad(loss), out_shardings=[split, split]).lower(layers, x)
        compiled = step.compile(compiler_options=given)
    found = [c for c in account(compiled.as_text()).collectives if c.kind == "reduce-scatter"]
    print([(c.name, c.asynchronous, c.rings, len(c.between), c.times) for c in found])
    assert found and all(c.asynchronous and c.rings == 2 for c in found)
    assert any(c.between_flops for c in found)


def test_a_tpu_multiplies_whole_where_tokens_are_many():
    """Without the option, products with large weights that are split cut and put together what they multiply."""
    tokens, width = 2**14, 4096
    devices, mesh, split, rows = on_fsdp("tpu:v5p:2x2x2")
    weights = jax.ShapeDtypeStruct((LAYERS, width, width), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((len(devices), tokens, width), jnp.bfloat16, sharding=rows)

    def layers(weights, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.silu(x @ w), None), x, weights)[0]

    moved = {}
    with jax.set_mesh(mesh):
        lowered = jax.jit(layers, out_shardings=rows).lower(weights, x)
        for count in (0, tokens):
            given = options.compiler_options(update=True, tokens=count)
            found = account(lowered.compile(compiler_options=given).as_text())
            moved[count] = found.traffic_bytes + found.product_bytes
            print(count, moved[count], sum(c.times for c in found.collectives if c.piece_of))
    assert not any(c.piece_of for c in found.collectives)
    assert moved[tokens] < 0.8 * moved[0]
    heads = jax.sharding.Mesh(np.array(devices).reshape(1, 4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(heads):  # there activations are gathered and summed as well
        assert options.compiler_options(update=True, tokens=tokens) == options.compiler_options(update=True)


@pytest.mark.parametrize(
    "machine,update,joined",
    [("gpu:h200:1x1x8", False, True), ("gpu:h200:1x1x8", True, False), ("gpu:h200:2x1x8", True, False)],
)
def test_gradients_go_out_as_they_are_made(machine, update, joined):
    """In a training step, where those that wait take memory, and over a network are not hidden."""
    devices, mesh, split, rows = on_fsdp(machine)
    layers = [jax.ShapeDtypeStruct((LAYERS, *dims), jnp.bfloat16, sharding=split) for dims in ((D, F), (F, D))]
    x = jax.ShapeDtypeStruct((ROWS * len(devices), D), jnp.bfloat16, sharding=rows)

    with jax.set_mesh(mesh):
        given = options.compiler_options(update=update)
        step = jax.jit(jax.grad(loss), out_shardings=[split, split]).lower(layers, x)
        compiled = step.compile(compiler_options=given)
    found = account(compiled.as_text()).collectives
    scatters = {(c.name, c.times) for c in found if c.kind == "reduce-scatter"}
    print(machine, [(c.name, c.kind, c.times, c.bytes) for c in found])
    assert sum(times for _, times in scatters) == (LAYERS if joined else 2 * LAYERS)
