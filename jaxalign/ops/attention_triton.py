"""Attention on NVIDIA GPUs: Pallas kernels for Triton that go through the blocks of keys that a block of queries sees.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) over intervals: one kernel forward, one for the gradients of
keys and values, one for the gradient of queries. Nothing of T x S numbers is held outside a block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.attention_scores import Scores, sloped
from jaxalign.ops.attention_shards import on_each_device
from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product_precision

_BLOCK_Q, _BLOCK_K = 64, 64  # at most; with the next two what tests/benchmarks/gpu_parts/blocks.py tries on a card
_WARPS, _STAGES = 4, 2
_LEAST = -1e30  # a maximum before any key was seen; finite, so that differences of two are numbers
_LOG2_E = math.log2(math.e)  # the kernels raise 2 to a power, which the hardware does in one instruction


class _Plan(NamedTuple):
    """What is fixed when the kernels are compiled: rows of a block of queries and of keys, how scores are made."""

    size_q: int
    size_k: int
    scores: Scores

    def of(self, products):
        """Scores for powers of 2, and the slope of their cap."""
        scale, softcap = self.scores
        if softcap is None:
            return products * (scale * _LOG2_E), None
        capped = jnp.tanh(products * (scale / softcap))
        return capped * (softcap * _LOG2_E), 1 - capped * capped


def triton_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, *, scores: Scores):
    """`attention` in O(T + S) memory, forward and backward; see there for arguments.

    On a CPU the kernels are run step by step, to check them.
    """
    return on_each_device(functools.partial(_local, scores), q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _local(scores, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    _, T, _, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    plan = _Plan(_block_size(T, _BLOCK_Q), _block_size(S, _BLOCK_K), scores)
    more_q, more_k, more_h = -T % plan.size_q, -S % plan.size_k, _power_of_two(H) - H
    # A padding query repeats the last interval: no wider, and not empty.
    start_BT, end_BT = (jnp.pad(x, ((0, 0), (0, more_q)), mode="edge") for x in (start_BT, end_BT))
    q = jnp.pad(q_BTNH, ((0, 0), (0, more_q), (0, 0), (0, more_h)))
    k, v = (jnp.pad(x, ((0, 0), (0, more_k), (0, 0), (0, more_h))) for x in (k_BSKH, v_BSKH))
    return _attend(plan, q, k, v, start_BT, end_BT)[:, :T, :, :H]


def _power_of_two(n: int) -> int:
    """The least one that is not below `n`, nor below 16, the least side of a Triton product."""
    return max(16, 1 << (n - 1).bit_length())


def _block_size(length: int, most: int) -> int:
    return min(most, _power_of_two(length))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, start, end):
    return _forward(plan, q, k, v, start, end)[0]


def _forward(plan, q, k, v, start, end):
    B, T, N, H = q.shape
    num_q = T // plan.size_q
    firsts, lasts = seen_blocks(start, end, plan.size_q, plan.size_k)
    out, log_total = _call(
        functools.partial(_forward_kernel, plan=plan),
        grid=(num_q, B, N),
        ins=(_queries(plan, H), *_keys_of(q, k), *_intervals(plan), *_bounds(num_q)),
        outs=(_queries(plan, H), _numbers(plan)),
        shapes=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
    )(q, k, v, start, end, firsts, lasts)
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, start, end, out, log_total)


def _backward(plan, saved, d_out):
    q, k, v, start, end, out, log_total = saved
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # Softmax's own correction, sum_s weight d_weight, from what is at hand: out . d_out.
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32))
    firsts, lasts = seen_blocks(start, end, plan.size_q, plan.size_k)
    (d_q,) = _call(
        functools.partial(_queries_kernel, plan=plan),
        grid=(T // plan.size_q, B, N),
        ins=(
            *(_queries(plan, H), *_keys_of(q, k), *_intervals(plan), *_bounds(T // plan.size_q)),
            *(_queries(plan, H), _numbers(plan), _numbers(plan)),
        ),
        outs=(_queries(plan, H),),
        shapes=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
    )(q, k, v, start, end, firsts, lasts, d_out, log_total, delta)

    # Queries that share a key side by side: [B, T, K, G, H], and [B, K, G, T] for the numbers of each.
    q, d_out = (x.reshape(B, T, K, N // K, H) for x in (q, d_out))
    log_total, delta = (x.reshape(B, K, N // K, T) for x in (log_total, delta))
    firsts, lasts = seeing_blocks(start, end, S, plan.size_q, plan.size_k)
    pl = _pallas()
    of_group = pl.BlockSpec((None, T, None, N // K, H), lambda j, b, h: (b, 0, h, 0, 0))
    numbers = pl.BlockSpec((None, None, N // K, T), lambda j, b, h: (b, h, 0, 0))
    of_keys = pl.BlockSpec((None, plan.size_k, None, H), lambda j, b, h: (b, j, h, 0))
    row = pl.BlockSpec((None, T), lambda j, b, h: (b, 0))
    d_k, d_v = _call(
        functools.partial(_keys_kernel, plan=plan),
        grid=(S // plan.size_k, B, K),
        ins=(of_group, of_keys, of_keys, row, row, *_bounds(S // plan.size_k), of_group, numbers, numbers),
        outs=(of_keys, of_keys),
        shapes=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    )(q, k, v, start, end, firsts, lasts, d_out, log_total, delta)
    return d_q, d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, end_ref, firsts, lasts, out_ref, log_total_ref, *, plan):
    pl = _pallas()
    q, start, end = q_ref[...], start_ref[...], end_ref[...]
    i = pl.program_id(0)

    def add(j, carry):
        top, total, out = carry
        keys = pl.ds(j * plan.size_k, plan.size_k)
        scores, _ = plan.of(_product(q, k_ref[keys, :], (1, 1)))
        scores = jnp.where(_visible(start, end, j, plan), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        part = _product(weights.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        return new_top, total * shrink + weights.sum(axis=1), out * shrink[:, None] + part

    zero = jnp.zeros(plan.size_q, jnp.float32)
    carry = (zero + _LEAST, zero, jnp.zeros(q.shape, jnp.float32))
    top, total, out = jax.lax.fori_loop(firsts[i], lasts[i], add, carry)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = top + jnp.log2(total)


def _queries_kernel(
    q_ref, k_ref, v_ref, start_ref, end_ref, firsts, lasts, d_out_ref, log_total_ref, delta_ref, d_q_ref, *, plan
):
    pl = _pallas()
    q, d_out, start, end = q_ref[...], d_out_ref[...], start_ref[...], end_ref[...]
    log_total, delta = log_total_ref[...][:, None], delta_ref[...][:, None]
    i = pl.program_id(0)

    def add(j, d_q):
        keys = pl.ds(j * plan.size_k, plan.size_k)
        k = k_ref[keys, :]
        scores, slope = plan.of(_product(q, k, (1, 1)))
        weights = jnp.where(_visible(start, end, j, plan), jnp.exp2(scores - log_total), 0)
        d_weights = _product(d_out, v_ref[keys, :], (1, 1))
        d_scores = sloped(weights * (d_weights - delta), slope)
        return d_q + _product(d_scores.astype(k.dtype), k, (1, 0))

    d_q = jax.lax.fori_loop(firsts[i], lasts[i], add, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = (d_q * plan.scores.scale).astype(d_q_ref.dtype)


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    firsts,
    lasts,
    d_out_ref,
    log_total_ref,
    delta_ref,
    d_k_ref,
    d_v_ref,
    *,
    plan,
):
    pl = _pallas()
    k, v = k_ref[...], v_ref[...]
    j = pl.program_id(0)
    first, last = firsts[j], lasts[j]

    def add(step, carry):
        d_k, d_v = carry
        # All heads of the group for each block of queries, which then is at hand for the next head.
        i, g = first + jax.lax.div(step, group), jax.lax.rem(step, group)
        rows = pl.ds(i * plan.size_q, plan.size_q)
        q, d_out = q_ref[rows, g, :], d_out_ref[rows, g, :]
        scores, slope = plan.of(_product(k, q, (1, 1)))
        visible = _visible(start_ref[rows], end_ref[rows], j, plan, keys_first=True)
        weights = jnp.where(visible, jnp.exp2(scores - log_total_ref[g, rows][None, :]), 0)
        d_weights = _product(v, d_out, (1, 1))
        d_scores = sloped(weights * (d_weights - delta_ref[g, rows][None, :]), slope)
        d_v = d_v + _product(weights.astype(d_out.dtype), d_out, (1, 0))
        return d_k + _product(d_scores.astype(q.dtype), q, (1, 0)), d_v

    group = q_ref.shape[1]
    zero = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, (last - first) * group, add, (zero, zero))
    d_k_ref[...] = (d_k * plan.scores.scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _product(a, b, contracted: tuple[int, int]):
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=product_precision(a.dtype), preferred_element_type=jnp.float32)


def _visible(start, end, j, plan: _Plan, keys_first: bool = False):
    """Which keys of block j each query of a block sees: [size_q, size_k], or transposed."""
    slot = j * plan.size_k + jnp.arange(plan.size_k, dtype=jnp.int32)
    if keys_first:
        return (slot[:, None] >= start[None, :]) & (slot[:, None] < end[None, :])
    return (slot[None, :] >= start[:, None]) & (slot[None, :] < end[:, None])


def seen_blocks(start_BT, end_BT, size_q: int, size_k: int):
    """For each block of queries the first block of keys that any of them sees, and one past the last: [B, Q] each."""
    B = start_BT.shape[0]
    first = start_BT.reshape(B, -1, size_q).min(axis=-1) // size_k
    return first, -(-end_BT.reshape(B, -1, size_q).max(axis=-1) // size_k)


def seeing_blocks(start_BT, end_BT, num_keys: int, size_q: int, size_k: int):
    """For each block of keys the first block of queries that sees any of them, and one past the last, equal where none
    does: [B, num_keys / size_k] each."""
    first, last = seen_blocks(start_BT, end_BT, size_q, size_k)
    block = jnp.arange(num_keys // size_k, dtype=first.dtype)[:, None]
    sees = (block >= first[:, None, :]) & (block < last[:, None, :])  # [B, keys' blocks, queries' blocks]
    lead = jnp.argmax(sees, axis=-1).astype(jnp.int32)
    tail = sees.shape[-1] - jnp.argmax(sees[..., ::-1], axis=-1).astype(jnp.int32)
    return lead, jnp.where(sees.any(axis=-1), tail, lead)


def _pallas() -> Any:
    from jax.experimental import pallas  # late: half a second, for those who have a GPU

    return pallas


def _queries(plan: _Plan, H: int):
    """A block of queries of one head, in [B, T, N, H]."""
    return _pallas().BlockSpec((None, plan.size_q, None, H), lambda i, b, n: (b, i, n, 0))


def _keys_of(q, k):
    """All keys, and values, of a query head's group, in [B, S, K, H]."""
    S, K, H = k.shape[1:]
    group = q.shape[2] // K
    spec = _pallas().BlockSpec((None, S, None, H), lambda i, b, n: (b, 0, jax.lax.div(n, group), 0))
    return spec, spec


def _intervals(plan: _Plan):
    spec = _pallas().BlockSpec((None, plan.size_q), lambda i, b, n: (b, i))
    return spec, spec


def _numbers(plan: _Plan):
    """One number for each query of a block of one head, in [B, N, T]."""
    return _pallas().BlockSpec((None, None, plan.size_q), lambda i, b, n: (b, n, i))


def _bounds(num: int):
    spec = _pallas().BlockSpec((None, num), lambda i, b, n: (b, 0))
    return spec, spec


def _call(kernel, *, grid, ins, outs, shapes):
    from jax.experimental.pallas import triton

    return _pallas().pallas_call(
        kernel,
        grid=grid,
        in_specs=list(ins),
        out_specs=list(outs),
        out_shape=list(shapes),
        interpret=platform() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    )
