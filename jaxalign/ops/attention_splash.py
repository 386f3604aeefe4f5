"""Attention on TPUs: JAX's splash kernels, told at run time which keys each query sees and which blocks to skip.

All rows of a call are one long sequence to the kernel, and each block of queries goes through the blocks of its own
row alone, so that no call is made for each row and no step of the grid is spent on another's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.attention_shards import on_each_device
from jaxalign.ops.platform import platform
from jaxalign.ops.precision import at_least_float32, product_precision

LIMIT = 2**15  # slots of a call: the kernel is given one number a query, its first key and the end in 16 bits each
_BLOCK = 512
_LANES = 128  # a block is a multiple of this


def splash_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, *, scores: Scores):
    """`attention` in O(T + S) memory, forward and backward; see there for arguments. T and S are at most `LIMIT`.

    On a CPU the kernels are run step by step, to check them.
    """
    return on_each_device(functools.partial(_local, scores), q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _local(scores, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    B, T = q_BTNH.shape[:2]
    S = k_BSKH.shape[1]
    size_q, size_k = _block_size(T), _block_size(S)
    more_q, more_k = -T % size_q, -S % size_k
    # A padding query repeats the last interval: no wider, and not empty.
    start_BT, end_BT = (jnp.pad(x, ((0, 0), (0, more_q)), mode="edge") for x in (start_BT, end_BT))
    q = (at_least_float32(q_BTNH) * scores.scale).astype(q_BTNH.dtype)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x, more in ((q, more_q), (k_BSKH, more_k), (v_BSKH, more_k))
    )
    rows = _rows_of_a_call(B, max(T + more_q, S + more_k))
    groups = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), (q, k, v, start_BT, end_BT))
    one = functools.partial(_one_sequence, size_q=size_q, size_k=size_k, softcap=scores.softcap)
    if rows == B:
        out = one(jax.tree.map(lambda x: x[0], groups))
    else:
        out = jax.lax.map(one, groups)
    out = out.reshape(B, T + more_q, *out.shape[-2:])
    # The kernel would give a query that sees nothing the average of a block.
    return jnp.where((start_BT < end_BT)[..., None, None], out, jnp.nan)[:, :T]


def _block_size(length: int) -> int:
    """Equal blocks of at most `_BLOCK`, in lanes."""
    num = -(-length // _BLOCK)
    return -(-length // (_LANES * num)) * _LANES


def _rows_of_a_call(rows: int, length: int) -> int:
    """The largest divisor of `rows` of which a call can hold as many rows."""
    if length > LIMIT:
        raise ValueError(f"splash attention takes rows of at most {LIMIT} tokens, not {length}")
    return next(n for n in range(rows, 0, -1) if rows % n == 0 and n * length <= LIMIT)


def _one_sequence(operands, *, size_q: int, size_k: int, softcap: float | None):
    """[R, T, N, H] and so on, R rows, to [R, T, N, H]."""
    # Late: an experimental part of JAX, and Pallas takes half a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    q, k, v, start, end = operands
    R, T, N, H = q.shape
    forward, transposed = _block_lists(start, end, T // size_q, k.shape[1] // size_k, size_k)
    offset = jnp.arange(R, dtype=jnp.int32)[:, None] * k.shape[1]
    interval = ((start + offset) << 16 | (end + offset)).reshape(R * T).astype(jnp.int32)
    kernel = splash.SplashAttentionKernel(
        _mask_info(forward, interval),
        _mask_info(forward, interval),
        _mask_info(transposed, interval),
        block_sizes=splash.BlockSizes(
            block_q=size_q,
            block_kv=size_k,
            block_q_dq=size_q,
            block_kv_dq=size_k,
            block_q_dkv=size_q,
            block_kv_dkv=size_k,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        mask_function=_sees,
        interpret=platform() == "cpu",
    )
    q, k, v = (x.reshape(-1, *x.shape[2:]).swapaxes(0, 1) for x in (q, k, v))
    with jax.default_matmul_precision(_precision_name(q.dtype)):
        out: Any = kernel(q, k, v)
    return out.swapaxes(0, 1).reshape(R, T, N, H)


def _sees(interval, slot):
    """Whether a query with this interval sees a key's slot; called by the kernel for a block of both."""
    return (slot >= interval >> 16) & (slot < interval & 0xFFFF)


def _precision_name(dtype) -> str | None:
    """The matmul precision of the kernels, which set none; one that the user has set stays."""
    precision = product_precision(dtype)
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return chosen if precision is None else precision.name.lower()


def _block_lists(start_RT, end_RT, num_q: int, num_k: int, size_k: int) -> tuple[tuple, tuple]:
    """Which blocks touch, and which block to fetch at each step of the grid: an untouched step names the next block
    that is needed, so that nothing is fetched for it and the next fetch is early.

    Returns:
      (touch, fetch) int32 [1, R * num_q, num_k] for the kernels that go through the keys of a block of queries, and
      [1, num_q, R * num_k] for the one that goes through the queries of a block of keys.
    """
    R = start_RT.shape[0]
    first = start_RT.reshape(R, num_q, -1).min(axis=-1)[..., None] // size_k
    last = -(-end_RT.reshape(R, num_q, -1).max(axis=-1)[..., None] // size_k)
    block = jnp.arange(num_k, dtype=jnp.int32)
    touch = ((block >= first) & (block < last)).astype(jnp.int32)  # [R, num_q, num_k]
    row = jnp.arange(R, dtype=jnp.int32)[:, None, None]
    fetch = _next_touched(touch, 2) + row * num_k
    forward = (touch.reshape(1, R * num_q, num_k), fetch.reshape(1, R * num_q, num_k))
    fetch = _next_touched(touch, 1) + row * num_q
    return forward, tuple(x.swapaxes(0, 1).reshape(1, num_q, R * num_k) for x in (touch, fetch))


def _next_touched(touch, axis: int):
    """Along an axis, the index of each block if it is touched, else of the next one that is, else of the last."""
    index = jax.lax.broadcasted_iota(jnp.int32, touch.shape, axis)
    size = touch.shape[axis]
    following = jax.lax.cummin(jnp.where(touch > 0, index, size), axis=axis, reverse=True)
    latest = jax.lax.cummax(jnp.where(touch > 0, index, 0), axis=axis)
    return jnp.where(following < size, following, latest).astype(jnp.int32)


def _mask_info(lists: tuple, interval) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    touch, fetch = lists
    return info.MaskInfo(
        data_next=fetch, mask_next=None, block_mask=touch, partial_mask_blocks=None, q_sequence=interval
    )
