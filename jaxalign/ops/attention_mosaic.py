"""Attention on NVIDIA's Hopper GPUs in 16 bits: Pallas kernels for Mosaic, one warpgroup fetching what two multiply.

The loops are those of `attention_triton`: a block of queries, or of keys, goes through the blocks that its intervals
touch. Those are copied to shared memory ahead of their use, and the matrix units read them there (FlashAttention-3,
arXiv 2407.08608, algorithm 1).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.attention_shards import on_each_device
from jaxalign.ops.attention_triton import seeing_blocks, seen_blocks

LIMIT = 128  # numbers of a head: of more, these blocks do not fit into shared memory and registers
_GROUPS = 2  # warpgroups that multiply
_ROWS = 64  # that each of them has: what one instruction of its matrix unit takes
_BLOCK = _GROUPS * _ROWS  # queries, or keys, that a program has of its own
_FORWARD, _BACKWARD = 128, 64  # rows of a block that is fetched: backward, registers hold two more matmuls' results
_STAGES = 2  # blocks on their way or in use
_LEAST = -1e30  # a maximum before any key was seen; finite, so that differences of two are numbers
_LOG2_E = math.log2(math.e)  # the kernels raise 2 to a power, which the hardware does in one instruction


class _Plan(NamedTuple):
    """What is fixed when the kernels are compiled: the scale of scores, and how many query heads share a key's."""

    scale: float
    shared: int


def mosaic_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, *, scores: Scores):
    """`attention` in O(T + S) memory, forward and backward; see there for arguments. 16 bits, H at most `LIMIT`."""
    return on_each_device(functools.partial(_local, scores.scale), q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _local(scale, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    _, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    more_q, more_k, more_h = -T % _BLOCK, -S % _BLOCK, -H % 64  # 64 numbers are the 128 bytes that tiles are made of
    # A padding query repeats the last interval: no wider, and not empty.
    start_BT, end_BT = (jnp.pad(x, ((0, 0), (0, more_q)), mode="edge") for x in (start_BT, end_BT))
    q = jnp.pad(q_BTNH, ((0, 0), (0, more_q), (0, 0), (0, more_h)))
    k, v = (jnp.pad(x, ((0, 0), (0, more_k), (0, 0), (0, more_h))) for x in (k_BSKH, v_BSKH))
    return _attend(_Plan(scale, N // K), q, k, v, start_BT, end_BT)[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, start, end):
    return _forward(plan, q, k, v, start, end)[0]


def _forward(plan, q, k, v, start, end):
    B, T, N, H = q.shape
    gpu = _mosaic()
    keys = gpu.SMEM((_STAGES, _FORWARD, H), q.dtype)
    numbers = gpu.SMEM((_GROUPS, _ROWS), jnp.int32)
    out, log_total = _call(
        _forward_kernel,
        plan,
        (q, k, v, start, end, *seen_blocks(start, end, _BLOCK, _FORWARD)),
        shapes=(q, jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        grid=(N, T // _BLOCK, B),
        own={"q": gpu.SMEM((_GROUPS, _ROWS, H), q.dtype), "start": numbers, "end": numbers},
        some={"k": keys, "v": keys},
        left={"log_total": gpu.SMEM((_GROUPS, _ROWS), jnp.float32)},
    )
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, start, end, out, log_total)


def _backward(plan, saved, d_out):
    q, k, v, start, end, out, log_total = saved
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # Softmax's own correction, sum_s weight d_weight, from what is at hand: out . d_out.
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32))
    gpu = _mosaic()
    rows, blocks = gpu.SMEM((_GROUPS, _ROWS, H), q.dtype), gpu.SMEM((_STAGES, _BACKWARD, H), q.dtype)

    def queries(count: int, size: int) -> dict[str, Any]:
        whole, real = gpu.SMEM((count, size), jnp.int32), gpu.SMEM((count, size), jnp.float32)
        return {"start": whole, "end": whole, "log_total": real, "delta": real}

    (d_q,) = _call(
        _queries_kernel,
        plan,
        (q, k, v, start, end, *seen_blocks(start, end, _BLOCK, _BACKWARD), d_out, log_total, delta),
        shapes=(q,),
        grid=(N, T // _BLOCK, B),
        own={"q": rows, "d_out": rows} | queries(_GROUPS, _ROWS),
        some={"k": blocks, "v": blocks},
    )
    d_k, d_v = _call(
        _keys_kernel,
        plan,
        (q, k, v, start, end, *seeing_blocks(start, end, S, _BACKWARD, _BLOCK), d_out, log_total, delta),
        shapes=(k, v),
        grid=(K, S // _BLOCK, B),
        own={"k": rows, "v": rows},
        some={"q": blocks, "d_out": blocks} | queries(_STAGES, _BACKWARD),
    )
    return d_q, d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(plan, q, k, v, start, end, firsts, lasts, out, log_total, *, own, some, left, mine, came, free):
    gpu = _mosaic()
    row, head, i, me, rows = _place()
    first = firsts[row, i]
    steps = lasts[row, i] - first

    def multiply():
        _bring({"q": q.at[row, rows, head], "start": start.at[row, rows], "end": end.at[row, rows]}, own, mine, me)
        gpu.barrier_wait(mine.at[me])
        q_here, start_here, end_here = own["q"].at[me], own["start"][me], own["end"][me]

        def add(step, carry):
            top, total, out = carry
            slot = _wait(came, step)
            scores = _product(q_here, _transposed(some["k"].at[slot])) * (plan.scale * _LOG2_E)
            slots = _count(scores, 1) + (first + step) * _FORWARD
            visible = _visible(slots, start_here, end_here, 0)
            scores = jnp.where(visible, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1))
            weights, shrink = jnp.exp2(scores - _along(new_top, scores, 0)), jnp.exp2(top - new_top)
            part = _product(weights.astype(v.dtype), some["v"].at[slot])
            gpu.barrier_arrive(free.at[slot])
            return new_top, total * shrink + weights.sum(axis=1), out * _along(shrink, out, 0) + part

        zero = jnp.zeros(_ROWS, jnp.float32)
        carry = (zero + _LEAST, zero, jnp.zeros(q_here.shape, jnp.float32))
        top, total, result = jax.lax.fori_loop(0, steps, add, carry)
        q_here[...] = (result / _along(total, result, 0)).astype(q.dtype)
        left["log_total"][me] = top + jnp.log(total) * _LOG2_E
        _leave((q_here, out.at[row, rows, head]), (left["log_total"].at[me], log_total.at[row, head, rows]))

    def fetch(step, slot):
        keys, shared = _pallas().ds((first + step) * _FORWARD, _FORWARD), jax.lax.div(head, plan.shared)
        _bring({"k": k.at[row, keys, shared], "v": v.at[row, keys, shared]}, some, came, slot)

    _share_out(multiply, fetch, steps, free)


def _queries_kernel(
    plan, q, k, v, start, end, firsts, lasts, d_out, log_total, delta, d_q, *, own, some, left, mine, came, free
):
    gpu = _mosaic()
    row, head, i, me, rows = _place()
    first = firsts[row, i]
    steps = lasts[row, i] - first

    def multiply():
        given = {"q": q.at[row, rows, head], "d_out": d_out.at[row, rows, head]}
        given |= {"start": start.at[row, rows], "end": end.at[row, rows]}
        given |= {"log_total": log_total.at[row, head, rows], "delta": delta.at[row, head, rows]}
        _bring(given, own, mine, me)
        gpu.barrier_wait(mine.at[me])
        q_here, start_here, end_here = own["q"].at[me], own["start"][me], own["end"][me]
        log_total_here, delta_here = own["log_total"][me], own["delta"][me]

        def run(d_q_sum):
            def add(step, _):
                slot = _wait(came, step)
                scores = _product(q_here, _transposed(some["k"].at[slot])) * (plan.scale * _LOG2_E)
                slots = _count(scores, 1) + (first + step) * _BACKWARD
                visible = _visible(slots, start_here, end_here, 0)
                weights = jnp.where(visible, jnp.exp2(scores - _along(log_total_here, scores, 0)), 0)
                d_weights = _product(own["d_out"].at[me], _transposed(some["v"].at[slot]))
                d_scores = weights * (d_weights - _along(delta_here, scores, 0))
                gpu.wgmma(d_q_sum, d_scores.astype(k.dtype), some["k"].at[slot])
                gpu.wgmma_wait(0)
                gpu.barrier_arrive(free.at[slot])

            jax.lax.fori_loop(0, steps, add, None)
            return d_q_sum[...]

        result = _pallas().run_scoped(run, gpu.ACC(q_here.shape, jnp.float32))
        q_here[...] = (result * plan.scale).astype(q.dtype)
        _leave((q_here, d_q.at[row, rows, head]))

    def fetch(step, slot):
        keys, shared = _pallas().ds((first + step) * _BACKWARD, _BACKWARD), jax.lax.div(head, plan.shared)
        _bring({"k": k.at[row, keys, shared], "v": v.at[row, keys, shared]}, some, came, slot)

    _share_out(multiply, fetch, steps, free)


def _keys_kernel(
    plan, q, k, v, start, end, firsts, lasts, d_out, log_total, delta, d_k, d_v, *, own, some, left, mine, came, free
):
    gpu = _mosaic()
    row, head, j, me, rows = _place()
    first = firsts[row, j]
    steps = (lasts[row, j] - first) * plan.shared

    def multiply():
        _bring({"k": k.at[row, rows, head], "v": v.at[row, rows, head]}, own, mine, me)
        gpu.barrier_wait(mine.at[me])
        k_here, v_here = own["k"].at[me], own["v"].at[me]

        def run(d_k_sum, d_v_sum):
            def add(step, _):
                slot = _wait(came, step)
                scores = _product(k_here, _transposed(some["q"].at[slot])) * (plan.scale * _LOG2_E)
                slots = _count(scores, 0) + rows.start
                visible = (slots >= _along(some["start"][slot], slots, 1)) & (
                    slots < _along(some["end"][slot], slots, 1)
                )
                weights = jnp.where(visible, jnp.exp2(scores - _along(some["log_total"][slot], scores, 1)), 0)
                gpu.wgmma(d_v_sum, weights.astype(v.dtype), some["d_out"].at[slot])
                d_weights = _product(v_here, _transposed(some["d_out"].at[slot]))
                d_scores = weights * (d_weights - _along(some["delta"][slot], scores, 1))
                gpu.wgmma(d_k_sum, d_scores.astype(k.dtype), some["q"].at[slot])
                gpu.wgmma_wait(0)
                gpu.barrier_arrive(free.at[slot])

            jax.lax.fori_loop(0, steps, add, None)
            return d_k_sum[...], d_v_sum[...]

        sums = gpu.ACC(k_here.shape, jnp.float32)
        d_k_here, d_v_here = _pallas().run_scoped(run, sums, sums)
        k_here[...] = (d_k_here * plan.scale).astype(k.dtype)
        v_here[...] = d_v_here.astype(v.dtype)
        _leave((k_here, d_k.at[row, rows, head]), (v_here, d_v.at[row, rows, head]))

    def fetch(step, slot):
        # All heads of the group for each block of queries, whose intervals then are near.
        i, query = first + jax.lax.div(step, plan.shared), head * plan.shared + jax.lax.rem(step, plan.shared)
        seeing = _pallas().ds(i * _BACKWARD, _BACKWARD)
        given = {"q": q.at[row, seeing, query], "d_out": d_out.at[row, seeing, query]}
        given |= {"start": start.at[row, seeing], "end": end.at[row, seeing]}
        given |= {"log_total": log_total.at[row, query, seeing], "delta": delta.at[row, query, seeing]}
        _bring(given, some, came, slot)

    _share_out(multiply, fetch, steps, free)


def _call(kernel, plan: _Plan, operands, *, shapes, grid, own, some, left=None):
    """The kernel for every head, block and row.

    Args:
      kernel: takes the plan, references to `operands` and results, and the shared memory by name.
      plan: its first argument.
      operands: arrays, in the GPU's memory.
      shapes: like which the results are.
      grid: numbers of heads, blocks and rows.
      own: shared memory that a warpgroup fills once, by name; [_GROUPS, ...] each.
      some: shared memory that is filled in turns, by name; [_STAGES, ...] each.
      left: shared memory of results that no other name has room for.
    """
    gpu = _mosaic()
    body: Any = functools.partial(kernel, plan)
    body.__name__ = kernel.__name__  # as a profile shows it
    run = gpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes),
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        scratch_types={
            "own": own,
            "some": some,
            "left": left or {},
            "mine": gpu.Barrier(num_barriers=_GROUPS, num_arrivals=len(own)),
            "came": gpu.Barrier(num_barriers=_STAGES, num_arrivals=len(some)),
            "free": gpu.Barrier(num_barriers=_STAGES, num_arrivals=_GROUPS),
        },
        compiler_params=gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )
    return run(*operands)


def _place():
    """Row, head, block, warpgroup, and the rows of the block that are the warpgroup's."""
    row, head, block, me = (jax.lax.axis_index(name) for name in ("row", "head", "block", "group"))
    return row, head, block, me, _pallas().ds(block * _BLOCK + me * _ROWS, _ROWS)


def _share_out(multiply, fetch, steps, free) -> None:
    """Two warpgroups `multiply()`; the third calls `fetch(step, slot)` whenever both of them have freed the slot."""
    when, gpu = _pallas().when, _mosaic()
    me = jax.lax.axis_index("group")

    @when(me < _GROUPS)
    def _multiplies():
        gpu.set_max_registers(240, action="increase")
        multiply()

    @when(me == _GROUPS)
    def _fetches():
        gpu.set_max_registers(24, action="decrease")

        def turn(step, _):
            slot = jax.lax.rem(step, _STAGES)

            @when(step >= _STAGES)
            def _wait_for_room():
                gpu.barrier_wait(free.at[slot])

            @when(step < steps)
            def _fetch():
                fetch(step, slot)

        # Turns beyond the last step only wait: no block ends with a barrier that it has not seen through.
        jax.lax.fori_loop(0, steps + _STAGES, turn, None)


def _bring(sources: dict[str, Any], targets: dict[str, Any], barriers, index) -> None:
    """Begins the copies to the shared memory of each name, at an index, which the barrier of that index counts."""
    for name, source in sources.items():
        _mosaic().copy_gmem_to_smem(source, targets[name].at[index], barriers.at[index])


def _leave(*pairs) -> None:
    """Copies from shared memory to results, and waits for them."""
    gpu = _mosaic()
    gpu.commit_smem()
    for source, target in pairs:
        gpu.copy_smem_to_gmem(source, target)
    gpu.wait_smem_to_gmem(0)


def _wait(came, step):
    """The slot of a step, once its block is there."""
    slot = jax.lax.rem(step, _STAGES)
    _mosaic().barrier_wait(came.at[slot])
    return slot


def _product(a, b):
    """`a @ b` in float32; b, and a or not, in shared memory."""
    gpu = _mosaic()

    def run(total):
        gpu.wgmma(total, a, b)
        return total[...]

    return _pallas().run_scoped(run, gpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _transposed(reference):
    return _mosaic().transpose_ref(reference, (1, 0))


def _count(like, axis: int):
    """0, 1, ... along an axis of a matrix."""
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)


def _visible(slots, start, end, axis: int):
    """Which slots of keys lie in the intervals of the queries, which are along an axis."""
    return (slots >= _along(start, slots, axis)) & (slots < _along(end, slots, axis))


def _along(x, like, axis: int):
    """A vector laid along an axis of a matrix, the same for each place of the other."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])


def _pallas() -> Any:
    from jax.experimental import pallas  # late: half a second, for those who have a GPU

    return pallas


def _mosaic() -> Any:
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu
