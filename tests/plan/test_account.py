"""Accounts of small programs against counts by hand: compiled for this CPU, and lines that other compilers write."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.parallel.hardware import read_machines
from jaxalign.plan.account import account
from jaxalign.plan.predict import alone_and_hidden, assumptions, predict

M, K, N, L = 16, 32, 48, 5


def compiled(function, *shapes, **kwargs):
    args = [s if isinstance(s, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(function, **kwargs).lower(*args).compile()


def test_a_product():
    found = account(compiled(jnp.dot, (M, K), (K, N)).as_text())
    (product,) = found.products
    assert (product.flops, product.times, product.dtypes) == (2 * M * K * N, 1, ("f32", "f32"))
    assert found.flops == 2 * M * K * N
    assert found.product_bytes == product.bytes == 4 * (M * K + K * N + M * N)
    assert found.flops_outside("f32") == 0 < found.flops_outside("bf16")
    assert found.collectives == () and found.assumed_trips == {}


@pytest.mark.parametrize("remat, passes", [(False, 3), (True, 4)])
def test_a_scan_is_counted_as_often_as_it_goes_round(remat, passes):
    """Forward one product a layer, backward two, and one more where what lies between is recomputed."""

    def body(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    def loss(ws, x):
        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, ws)[0].sum()

    found = account(compiled(jax.grad(loss, (0, 1)), (L, K, K), (M, K)).as_text())
    # Of the two products of a layer, the second's result is not needed before its tanh's derivative: it is, so both.
    assert found.flops == passes * 2 * L * 2 * M * K * K
    assert {p.times for p in found.products} == {L}


def test_a_loop_whose_turns_depend_on_data():
    def function(n, x, w):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))

    text = compiled(function, jax.ShapeDtypeStruct((), jnp.int32), (M, K), (K, K)).as_text()
    once = 2 * M * K * K
    assert account(text).flops == once
    found = account(text, 7)
    assert found.flops == 7 * once
    assert list(found.assumed_trips.values()) == [7]
    assert account(text, {"while": 3}).flops == 3 * once
    assert account(text, {"another": 3}).flops == once


def test_of_a_conditional_the_larger_branch():
    def function(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w, lambda: (x @ w) @ w)

    found = account(compiled(function, jax.ShapeDtypeStruct((), jnp.bool_), (M, K), (K, K)).as_text())
    assert found.flops == 2 * 2 * M * K * K
    assert len(found.branches) == 1


def test_a_slice_is_read_and_an_update_written_alone():
    """A kernel that adds one to a row of many moves the row twice."""

    def function(x, i):
        row = jax.lax.dynamic_slice_in_dim(x, i, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, row + 1, i, 0)

    text = compiled(function, (1000, 128), jax.ShapeDtypeStruct((), jnp.int32), donate_argnums=0).as_text()
    assert account(text).traffic_bytes < 20 * 4 * 128


def mesh(**axes):
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:count]).reshape(*axes.values())
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def test_collectives_in_a_scan():
    """Each of L turns gathers a weight over four devices, scatters a sum, and sums a number."""

    def local(ws, x):
        def body(x, w):
            whole = jax.lax.all_gather(w, "b", axis=0, tiled=True)  # [K, K] from [K / 4, K]
            y = jax.lax.psum_scatter(x @ whole, "b", scatter_dimension=0, tiled=True)  # [M / 4, K]
            return jnp.tile(y, (4, 1)) / jax.lax.psum(y.sum(), ("a", "b")), None

        return jax.lax.scan(body, x, ws)[0]

    with jax.set_mesh(mesh(a=2, b=4)):
        shards = jax.shard_map(local, in_specs=(P(None, "b"), P()), out_specs=P(), check_vma=False)
        found = account(compiled(shards, (L, K, K), (M, K)).as_text())
    assert found.num_devices == 8
    of = {c.kind: c for c in found.collectives}
    gather, scatter, total = of["all-gather"], of["reduce-scatter"], of["all-reduce"]
    assert (gather.dtype, gather.bytes, gather.times, gather.group_size) == ("f32", 4 * K * K, L, 4)
    assert gather.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert gather.moved == 4 * K * K * 3 / 4
    assert (scatter.bytes, scatter.times) == (4 * M * K, L)
    assert (total.bytes, total.times, total.group_size) == (4, L, 8)
    assert "while" in gather.loop and gather.asked
    assert found.bytes_of("all-gather") == L * 4 * K * K
    assert found.resharding() == ()


def test_resharding_that_nobody_asked_for():
    """A parameter is gathered for its product; a computed array that has to be whole is told."""

    def function(x, w):
        y = jnp.sin(x @ w)  # rows of each device
        return jax.lax.with_sharding_constraint(y, P(None, "b")), w

    there = mesh(b=4)
    rows = NamedSharding(there, P("b"))
    x = jax.ShapeDtypeStruct((M, K), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((K, K), jnp.float32, sharding=rows)
    with jax.set_mesh(there):
        found = account(compiled(function, x, w).as_text())
    assert [c.kind for c in found.resharding()] == ["all-to-all"]
    (gather,) = [c for c in found.collectives if c.kind == "all-gather"]
    assert gather.source


def test_a_parameter_is_known_inside_loops():
    """Stacked weights that are cut and gathered in a scan inside a scan, forward and backward."""

    def function(ws, x):
        def layer(y, w):
            return jnp.tanh(y @ w), None

        def part(total, rows):
            return total + jax.lax.scan(layer, rows, ws)[0].sum(), None

        return jax.lax.scan(part, jnp.zeros(()), x)[0]

    there = mesh(b=4)
    ws = jax.ShapeDtypeStruct((L, K, K), jnp.float32, sharding=NamedSharding(there, P(None, "b")))
    x = jax.ShapeDtypeStruct((3, M, K), jnp.float32, sharding=NamedSharding(there, P(None, "b")))
    with jax.set_mesh(there):
        found = account(compiled(jax.grad(function), ws, x).as_text())
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert gathers
    assert {c.source for c in gathers} == {"ws"}
    assert found.bytes_of("all-gather") in (3 * L * 4 * K * K, 3 * 2 * L * 4 * K * K)
    assert found.flops == 3 * L * 3 * 2 * (M / 4) * K * K


# What compilers for accelerators write, cut down to what is read.
GPU = """HloModule jit_step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%gemm_fusion_dot_computation (x.1: bf16[64,128], w.1: bf16[128,256]) -> bf16[64,256] {
  %x.1 = bf16[64,128]{1,0} parameter(0)
  %w.1 = bf16[128,256]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,256]{1,0} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[64,128], w: bf16[16,256], v: bf16[16,128], g: f32[256,128]) -> bf16[64,256] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[16,256]{1,0} parameter(1), metadata={op_name="state.w"}
  %v = bf16[16,128]{1,0} parameter(2)
  %g = f32[256,128]{1,0} parameter(3)
  %start = ((bf16[16,256]{1,0}, bf16[16,128]{1,0}), (bf16[128,256]{1,0}, bf16[128,128]{1,0})) all-gather-start(%w, %v), replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %early = (bf16[64,128]{1,0}, s8[0]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %scatter = ((f32[256,128]{1,0}), f32[32,128]{1,0}) reduce-scatter-start(%g), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":true}}
  %done.1 = f32[32,128]{1,0} reduce-scatter-done(%scatter)
  %done = (bf16[128,256]{1,0}, bf16[128,128]{1,0}) all-gather-done(%start)
  %whole = bf16[128,256]{1,0} get-tuple-element(%done), index=0
  ROOT %gemm_fusion_dot = bf16[64,256]{1,0} fusion(%x, %whole), kind=kCustom, calls=%gemm_fusion_dot_computation
}
"""  # noqa: E501


def test_a_gpu_program():
    found = account(GPU)
    early, fused = 2 * 64 * 128 * 64, 2 * 64 * 128 * 256
    assert sorted(p.flops for p in found.products) == [early, fused]
    gather, scatter = found.collectives
    assert (gather.kind, gather.dtype, gather.bytes) == ("all-gather", "bf16", 2 * (128 * 256 + 128 * 128))
    assert gather.asynchronous and gather.between_flops == early
    assert gather.source == "state.w"
    assert (scatter.kind, scatter.bytes, scatter.asynchronous) == ("reduce-scatter", 4 * 256 * 128, False)


OVERLAPPING = """HloModule jit_step, num_partitions=2

ENTRY %main (x: bf16[1024,2048], y: bf16[2048,2560], w: bf16[4096,3067], v: bf16[4096,3067]) -> bf16[1024,2560] {
  %x = bf16[1024,2048]{1,0} parameter(0)
  %y = bf16[2048,2560]{1,0} parameter(1)
  %w = bf16[4096,3067]{1,0} parameter(2)
  %v = bf16[4096,3067]{1,0} parameter(3)
  %first = (bf16[4096,3067]{1,0}, bf16[8192,3067]{1,0}) all-gather-start(%w), replica_groups=[1,2]<=[2], dimensions={0}
  %second = (bf16[4096,3067]{1,0}, bf16[8192,3067]{1,0}) all-gather-start(%v), replica_groups=[1,2]<=[2], dimensions={0}
  %dot = bf16[1024,2560]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = bf16[8192,3067]{1,0} all-gather-done(%first)
  %two = bf16[8192,3067]{1,0} all-gather-done(%second)
  ROOT %copy = bf16[1024,2560]{1,0} bitcast(%dot)
}
"""


def test_two_gathers_that_wait_for_one_product():
    """The product hides the first as far as it lasts, the second not at all."""
    h200 = assumptions(read_machines()["h200"], ["efficiency=0.5", "link_efficiency=1", "latency=0"])
    found = account(OVERLAPPING)
    first, second = found.collectives
    assert first.between == second.between and first.between_flops == found.flops == 2 * 1024 * 2048 * 2560
    devices = [types.SimpleNamespace(id=i, slice_index=0) for i in range(2)]
    gather = 2 * 4096 * 3067 / 450e9  # 55.8 us
    product = found.flops / (0.5 * 989e12)  # 21.7 us
    assert [hidden for _, _, hidden in alone_and_hidden(found, h200, devices)] == pytest.approx([product, 0.0])
    assert predict(found, h200, devices).collectives == pytest.approx(2 * gather - product)
    assert 1e6 * (2 * gather - product) == pytest.approx(89.9, abs=0.1)


def test_attention_kernels_of_a_gpu():
    """Two rows of 128 tokens, four heads of 64: forward two products, of the keys' gradient four, half of it seen."""

    def call(results, operands, name):
        inputs = "\n".join(f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands))
        names = ", ".join(f"%p{i}" for i in range(len(operands)))
        return f"""HloModule m
ENTRY %main () -> f32[] {{
{inputs}
  ROOT %pallas_call = {results} custom-call({names}), custom_call_target="__gpu$xla.gpu.triton", backend_config={{name = "{name}"}}
}}
"""  # noqa: E501

    q, k, ends = "bf16[2,128,4,64]{3,2,1,0}", "bf16[2,128,2,64]{3,2,1,0}", "s32[2,128]{1,0}"
    one = 2 * 2 * 4 * 128 * 128 * 64
    forward = account(call(f"({q}, f32[2,4,128]{{2,1,0}})", (q, k, k, ends, ends), "_forward_kernel"))
    assert forward.flops == forward.attention_flops == 2 * one / 2
    grouped = "bf16[2,128,2,2,64]{4,3,2,1,0}"
    keys = account(call(f"({k}, {k})", (grouped, k, k, ends, ends, grouped), "_keys_kernel"), visible=1.0)
    assert keys.flops == 4 * one
    assert [p.what for p in keys.products] == ["attention dkv"]
    other = account(call(q, (q, k), "another"))
    assert other.flops == 0 and other.unknown_kernels == ("__gpu$xla.gpu.triton",)


TPU = """HloModule jit_step, num_partitions=4

%cond (c: (bf16[8,4,16], bf16[4,16], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %c = (bf16[8,4,16]{2,1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (l: bf16[8,4,16], r: bf16[4,16]) -> bf16[8,4,4] {
  %l = bf16[8,4,16]{2,1,0:T(8,128)} parameter(0)
  %r = bf16[4,16]{1,0:T(8,128)} parameter(1)
  %r.3 = bf16[4,16,1]{1,0,2:T(8,128)} bitcast(%r)
  ROOT %convolution = bf16[8,4,4]{2,1,0:T(8,128)} convolution(%l, %r.3), window={size=1}, dim_labels=0bf_oi0->0bf
}

%windowed_dot_general_body_ag (b: (bf16[8,4,16], bf16[4,16], u32[])) -> (bf16[8,4,16], bf16[4,16], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %b = (bf16[8,4,16]{2,1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %x.1 = bf16[8,4,16]{2,1,0:T(8,128)} get-tuple-element(%b), index=0
  %w.1 = bf16[4,16]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %n = u32[]{:T(128)} get-tuple-element(%b), index=2
  %send = (bf16[4,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w.1), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %part = bf16[8,4,4]{2,1,0:T(8,128)S(1)} fusion(%x.1, %w.1), kind=kOutput, calls=%fused
  %next = u32[]{:T(128)} add(%n, %two)
  %sent = bf16[4,16]{1,0:T(8,128)} collective-permute-done(%send)
  ROOT %out = (bf16[8,4,16]{2,1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%x.1, %sent, %next)
}

ENTRY %main (x: bf16[8,4,16], w: bf16[4,16]) -> (bf16[8,4,16], bf16[4,16], u32[]) {
  %zero = u32[]{:T(128)} constant(0)
  %x = bf16[8,4,16]{2,1,0:T(8,128)} parameter(0)
  %w = bf16[4,16]{1,0:T(8,128)} parameter(1)
  %first = (bf16[4,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %shard = bf16[4,16]{1,0:T(8,128)} collective-permute-done(%first)
  %from = u32[]{:T(128)} copy(%zero)
  %all = (bf16[8,4,16]{2,1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:T(128)}) tuple(%x, %shard, %from)
  ROOT %while = (bf16[8,4,16]{2,1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}, u32[]{:T(128)}) while(%all), condition=%cond, body=%windowed_dot_general_body_ag, metadata={op_name="a/dot_general"}
}
"""  # noqa: E501


def test_a_tpu_gathers_beside_its_products():
    """The counter goes by two to four; a convolution is a product; permutes are pieces of a gather."""
    found = account(TPU)
    (product,) = found.products
    assert (product.flops, product.times) == (2 * 8 * 4 * 16 * 4, 2)
    assert {c.piece_of for c in found.collectives} == {"all-gather"}
    assert sum(c.times for c in found.collectives) == 3
    assert found.bytes_of("all-gather") == 2 * 4 * 4 * 16  # three pieces of four
    assert found.resharding() == ()
    inside = next(c for c in found.collectives if c.loop)
    assert inside.asynchronous and inside.between_flops == product.flops
    # What lies in a core's own memory is no traffic.
    assert found.product_bytes == 2 * 2 * (8 * 4 * 16 + 4 * 16)


def test_a_batched_product_as_a_convolution():
    """A batch of 8 written as a dimension that strides and dilates, of which a window meets one number each."""
    text = """HloModule m, num_partitions=1
ENTRY %main (l: bf16[8,32,64], r: bf16[8,64,16]) -> bf16[8,32,16] {
  %l = bf16[8,32,64]{2,1,0:T(8,128)} parameter(0)
  %r = bf16[8,64,16]{2,1,0:T(8,128)} parameter(1)
  ROOT %c = bf16[8,32,16]{2,1,0:T(8,128)} convolution(%l, %r), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501
    assert account(text).flops == 2 * 8 * 32 * 64 * 16


def test_what_goes_to_the_host_and_what_moves_most():
    """A kept array of 2 x 64 bytes goes out to the host's memory; on the device it is read, and its sum is the most."""
    text = """HloModule m, num_partitions=1
ENTRY %main (x: f32[32]) -> f32[32] {
  %x = f32[32]{0} parameter(0)
  %y = f32[32]{0} add(%x, %x), metadata={op_name="twice"}
  %out = (f32[32]{0:S(5)}, f32[32]{0}, u32[]) copy-start(%y)
  ROOT %z = f32[32]{0} negate(%y)
  %gone = f32[32]{0:S(5)} copy-done(%out)
}
"""
    found = account(text)
    assert found.host_bytes == 128
    assert found.traffic_bytes == 3 * 128 + 128 + 2 * 128
    assert (found.heaviest[0].op_name, found.heaviest[0].bytes, found.heaviest[0].times) == ("twice", 3 * 128, 1)
    assert found.kernels == 3


def test_a_part_that_comes_from_the_host():
    """A slice of what lies there, begun by an asynchronous fusion: only the slice is moved."""
    text = """HloModule m, num_partitions=1

%wrapped (a: f32[8,32], i: s32[]) -> f32[1,32] {
  %a = f32[8,32]{1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,32]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,32}
}

ENTRY %main (kept: f32[8,32], at: s32[]) -> f32[1,32] {
  %kept = f32[8,32]{1,0:S(5)} parameter(0)
  %at = s32[] parameter(1)
  %start = ((f32[8,32]{1,0:S(5)}, s32[]), f32[1,32]{1,0}, u32[]) fusion-start(%kept, %at), kind=kCustom, calls=%wrapped
  ROOT %done = f32[1,32]{1,0} fusion-done(%start)
}
"""
    found = account(text)
    assert found.host_bytes == 4 * 32
    assert found.traffic_bytes == 4 * 32 + 4  # written, and where it lies


def test_an_all_reduce_of_which_a_part_is_read():
    text = """HloModule m, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[64], at: s32[]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %at = s32[] parameter(1)
  %whole = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = f32[16]{0} dynamic-slice(%whole, %at), dynamic_slice_sizes={16}
}
"""
    (found,) = account(text).collectives
    assert found.could_scatter
    assert found.moved == 2 * 256 * 3 / 4
    (whole,) = account(text.replace("dynamic-slice(%whole, %at)", "slice(%x)").replace("%at = ", "%b = ")).collectives
    assert not whole.could_scatter


def test_a_tpu_scatters_and_gathers_in_fusions():
    """A sum and its slice in one fusion; a gather that one fusion begins, one goes on with and one ends."""
    text = """HloModule m, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (g: bf16[64,128]) -> bf16[16,128] {
  %g = bf16[64,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %sum = bf16[64,128]{1,0:T(8,128)} all-reduce(%g), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = bf16[16,128]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,128}
}

%begin (s: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %s = bf16[16,128]{1,0:T(8,128)} parameter(0)
  %first = bf16[64,128]{1,0:T(8,128)} all-gather(%s), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[16,128]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)}) tuple(%s, %first)
}

%async_collective_fusion.2 (s.2: bf16[16,128], x.2: bf16[32,64], y.2: bf16[64,128]) -> bf16[32,128] {
  %s.2 = bf16[16,128]{1,0:T(8,128)} parameter(0)
  %x.2 = bf16[32,64]{1,0:T(8,128)} parameter(1)
  %y.2 = bf16[64,128]{1,0:T(8,128)} parameter(2)
  %more = bf16[64,128]{1,0:T(8,128)} all-gather(%s.2), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %conv = bf16[32,128]{1,0:T(8,128)} convolution(%x.2, %y.2), dim_labels=bf_io->bf
}

%end (s.3: bf16[16,128]) -> bf16[64,128] {
  %s.3 = bf16[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %last = bf16[64,128]{1,0:T(8,128)} all-gather(%s.3), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (w: bf16[16,128], x: bf16[32,64], y: bf16[64,128]) -> bf16[64,128] {
  %w = bf16[16,128]{1,0:T(8,128)} parameter(0)
  %x = bf16[32,64]{1,0:T(8,128)} parameter(1)
  %y = bf16[64,128]{1,0:T(8,128)} parameter(2)
  %async-collective-start = (bf16[16,128]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)}) fusion(%w), kind=kCustom, calls=%begin
  %s = bf16[16,128]{1,0:T(8,128)} get-tuple-element(%async-collective-start), index=0
  %product = bf16[32,128]{1,0:T(8,128)} fusion(%s, %x, %y), kind=kOutput, calls=%async_collective_fusion.2
  %scattered = bf16[16,128]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %async-collective-done = bf16[64,128]{1,0:T(8,128)} fusion(%s), kind=kCustom, calls=%end
}
"""  # noqa: E501
    found = account(text)
    gather, scatter = found.collectives
    assert (gather.kind, gather.bytes, gather.times, gather.asynchronous) == ("all-gather", 2 * 64 * 128, 1, True)
    assert gather.source == "w"
    assert gather.between_flops == found.flops == 2 * 32 * 64 * 128
    assert (scatter.kind, scatter.bytes, scatter.asynchronous) == ("reduce-scatter", 2 * 64 * 128, False)
    assert found.product_bytes == 2 * (32 * 64 + 64 * 128 + 32 * 128)
    assert found.traffic_bytes == 0
