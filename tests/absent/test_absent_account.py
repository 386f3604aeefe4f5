"""Programs compiled for accelerators that are not there, counted: products, collectives and bytes against a hand's."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import config as configuration
from jaxalign.ops.attention import attention
from jaxalign.ops.readout import token_logprobs
from jaxalign.parallel.mesh import AXES
from jaxalign.plan import machines
from jaxalign.plan.account import account
from jaxalign.plan.plan import plan_step
from jaxalign.train import compiled
from jaxalign.train.arguments import step_arguments
from jaxalign.types import Readouts

MACHINES = ("gpu:h200:1x8x1", "tpu:v5p:2x2x2")
L, M, D = 2, 4096, 1024  # layers, rows over all devices, width


@pytest.mark.parametrize("machine", MACHINES)
def test_two_layers(machine):
    """Float32 weights over eight devices, used in bfloat16: gathered forward and backward, gradients scattered."""
    mesh = jax.sharding.Mesh(np.array(machines.absent_devices(machine)), "b", axis_types=(jax.sharding.AxisType.Auto,))
    rows, parts = NamedSharding(mesh, P("b")), NamedSharding(mesh, P(None, "b"))

    def loss(ws, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16)), None

        return jax.lax.scan(body, x, ws)[0].astype(jnp.float32).sum()

    ws = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=parts)
    x = jax.ShapeDtypeStruct((M, D), jnp.bfloat16, sharding=rows)
    program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(parts, rows)).lower(ws, x).compile()
    found, memory = account(program.as_text()), program.memory_analysis()

    assert found.flops == 3 * L * 2 * (M / 8) * D * D
    assert found.flops_outside("bf16") == 0
    assert {p.times for p in found.products} <= {1, L}
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert found.bytes_of("all-gather") == 2 * L * 2 * D * D
    assert {(c.dtype, c.group_size) for c in gathers} == {("bf16", 8)}
    # A TPU sums so small gradients whole, and each device takes its part.
    assert found.bytes_of("reduce-scatter" if machine.startswith("gpu") else "all-reduce") == L * 2 * D * D
    assert any(c.could_scatter for c in found.collectives) == machine.startswith("tpu")
    assert {c.source for c in gathers} == {"ws"}
    assert found.resharding() == ()
    moved = found.traffic_bytes + found.product_bytes
    assert moved > memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert found.largest[0].shape.bytes <= memory.temp_size_in_bytes + memory.output_size_in_bytes
    print(machine, found.traffic_bytes, found.product_bytes, memory.temp_size_in_bytes)


@pytest.mark.parametrize(
    "machine, backend", [("gpu:h200:1x4x1", "triton"), ("gpu:h200:1x4x1", "mosaic"), ("tpu:v5e:2x2", "splash")]
)
def test_attention_kernels(machine, backend):
    """Two rows and four heads a device: forward two products of queries and keys, for gradients three and four."""
    T, heads, head_dim = 512, 4, 128
    devices = np.array(machines.absent_devices(machine)).reshape(2, 1, 2)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    q, k = (jax.ShapeDtypeStruct((4, T, n, head_dim), jnp.bfloat16, sharding=rows) for n in (2 * heads, 4))
    ends = jax.ShapeDtypeStruct((4, T), jnp.int32, sharding=rows)

    def gradients(q, k, v, start, end):
        run = functools.partial(attention, start_BT=start, end_BT=end, backend=backend)
        out, back = jax.vjp(run, q, k, v)
        return out, *back(out)

    with jax.set_mesh(mesh):
        found = account(jax.jit(gradients).lower(q, k, k, ends, ends).compile().as_text())
    one = 2 * 2 * T * T * heads * head_dim / 2  # half of the pairs are seen
    matmuls = {"attention": 2, "attention dq": 3, "attention dkv": 4}
    assert {p.what: p.total for p in found.products} == {what: n * one for what, n in matmuls.items()}
    assert found.unknown_kernels == ()


def test_a_loss_reads_its_logits_twice():
    """On a GPU: for their maximum, and for the sum of exponentials; not to find those of the targets."""
    V = 32768
    devices = np.array(machines.absent_devices(MACHINES[0])).reshape(1, 8, 1)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows, parts = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("fsdp", "tensor"))
    hidden = jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16, sharding=rows)
    head = jax.ShapeDtypeStruct((128, V), jnp.bfloat16, sharding=parts)
    index, seen = (jax.ShapeDtypeStruct((8, 256), dtype, sharding=rows) for dtype in (jnp.int32, bool))

    def loss(hidden, head, target, mask):
        return token_logprobs(hidden, head, Readouts(None, target, target, mask))[0]

    with jax.set_mesh(mesh):
        found = account(jax.jit(loss).lower(hidden, head, index, seen).compile().as_text())
    assert 2 <= found.traffic_bytes / (4 * 256 * V) < 2.1
    assert found.bytes_of("all-gather") == 2 * 128 * V


@pytest.mark.parametrize(
    "remat, machine", [("none", MACHINES[0]), ("dots", MACHINES[0]), ("full", MACHINES[0]), ("full", MACHINES[1])]
)
def test_a_train_step_multiplies_what_its_model_says(remat, machine, shared, tmp_path, monkeypatch):
    """Of each layer one product forward for two backward; `full` makes all but the last of them again."""
    data = tmp_path / "data.jsonl"
    record = {"prompt": "The red fox", "completion": " ran to the big green tree and sat down." * 9}
    data.write_text((json.dumps(record) + "\n") * 64)
    c = configuration.defaults("sft")
    c.workdir, c.data.sources = str(tmp_path), (str(data),)
    c.model.path, c.model.dtype, c.model.remat = str(shared / "models" / "stories3m-llama"), "bfloat16", remat
    c.data.max_length, c.batch_size = 256, 32
    executables, shapes, of = [], [], compiled.memory_of
    monkeypatch.setattr(compiled, "memory_of", lambda x, *more: executables.append(x) or of(x, *more))
    monkeypatch.setattr(
        "jaxalign.plan.programs.step_arguments", lambda s: shapes.append(step_arguments(s)) or shapes[0]
    )
    devices = math.prod(plan_step(c, machine)["mesh"].values())
    found = account(executables[0].as_text())

    embed, mlp, heads, kv, head_dim, layers, vocab = 192, 512, 6, 2, 32, 6, 4096
    rows, length = (n // d for n, d in zip(shapes[0][2].rows.tokens.shape, (devices, 1), strict=True))
    down = 2 * rows * length * layers * mlp * embed
    forward = 2 * down + down + 2 * rows * length * layers * embed * head_dim * (2 * heads + 2 * kv)
    again = forward - down if remat == "full" else 0
    if machine.startswith("tpu"):  # where queries and keys are rotated by a product
        rotated = 2 * rows * length * layers * (heads + kv) * head_dim * head_dim
        again += rotated * (3 if remat == "full" else 2)
    head = 2 * shapes[0][2].readouts.target.size // devices * embed * vocab
    dots = found.flops - found.attention_flops
    in_head = sum(p.total for p in found.products if p.what == "dot" and "shard_map" in p.op_name)
    assert dots - in_head == 3 * forward + again
    assert in_head in (3 * head, 4 * head)
    length += -length % (64 if machine.startswith("gpu") else 128)  # to which kernels fill up
    pairs = rows * length * length * layers * heads * head_dim / 2  # half of them are seen
    passes = {"attention": 2 if remat == "full" else 1, "attention dq": 1, "attention dkv": 1}
    matmuls = {"attention": 2, "attention dq": 3, "attention dkv": 4}
    assert found.attention_flops == sum(2 * pairs * matmuls[what] * times for what, times in passes.items())
    if machine.startswith("gpu"):  # layers one by one: no residual is written into a stack, nor read from one
        assert f"bf16[{layers},{rows}," not in executables[0].as_text()
    if remat == "dots":  # which keeps queries and keys as they are rotated
        assert "rematted_computation/concatenate" not in executables[0].as_text()
    assert found.flops_outside("bf16") == 0
