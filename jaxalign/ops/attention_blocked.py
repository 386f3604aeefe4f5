"""Attention in blocks of queries and keys: blocks that no interval touches are skipped, T x S numbers never exist.

The sums over keys run with a moving maximum, and the backward pass makes each block's weights anew from the saved
logarithm of the total (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.ops.attention_scores import Scores, Window, sloped
from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product

# Rows of a block of queries, of keys. A CPU's cache likes small blocks, which also skip more of a short row; an
# accelerator wants large matmuls and few steps.
_ACCELERATOR_BLOCKS = (512, 512)
_LEAST = -1e30  # a maximum before any key was seen; finite, so that differences of two are numbers

SAVED = "attention"  # what a rematerialisation policy may keep instead of running the forward pass again


class _Blocks(NamedTuple):
    """How a problem is cut: numbers and sizes of blocks, the last ones padded."""

    num_q: int
    size_q: int
    num_k: int
    size_k: int


def blocked_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, window=None, *, scores: Scores):
    """`attention` with the memory of O(T) numbers and the work of the visible blocks; see there for arguments."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    most_q, most_k = _cpu_blocks(T) if platform() == "cpu" else _ACCELERATOR_BLOCKS
    blocks = _Blocks(*_cut(T, most_q), *_cut(S, most_k))
    extra = blocks.num_q * blocks.size_q - T
    if extra:
        # A padding query repeats the last interval: no wider, and not empty.
        start_BT, end_BT = (jnp.pad(x, ((0, 0), (0, extra)), mode="edge") for x in (start_BT, end_BT))
    k, v = (_pad(x, blocks.num_k * blocks.size_k - S).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
    q = _split(_pad(q_BTNH, extra), blocks, k.shape[1])
    if window is not None:
        least = _split_rows(jnp.pad(window.least, ((0, 0), (0, extra)), mode="edge"), blocks)
        window = Window(least, jnp.pad(window.positions, ((0, 0), (0, k.shape[2] - S))))
    out = _attend(blocks, scores, q, k, v, *(_split_rows(x, blocks) for x in (start_BT, end_BT)), window)
    return _join(out, blocks, q_BTNH.shape[2])[:, :T]


def _cpu_blocks(length: int) -> tuple[int, int]:
    return (64, 64) if length <= 256 else (128, 128)


def _cut(length: int, most: int) -> tuple[int, int]:
    """Number and size of the blocks: equal ones of at most `most` rows, in eights."""
    num = -(-length // most)
    return num, -(-length // (8 * num)) * 8


def _pad(x, extra: int):
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


def _split(x_BTNH, blocks: _Blocks, K: int):
    """[B, T, N, H] to [Q, B, K, R, H]: Q blocks of queries, R = G * size rows that share keys."""
    B, _, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, blocks.num_q, blocks.size_q, K, N // K, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(blocks.num_q, B, K, N // K * blocks.size_q, H)


def _join(x_QBKRH, blocks: _Blocks, N: int):
    """The inverse of `_split`."""
    Q, B, K, _, H = x_QBKRH.shape
    x = x_QBKRH.reshape(Q, B, K, N // K, blocks.size_q, H)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, Q * blocks.size_q, N, H)


def _split_rows(x_BT, blocks: _Blocks):
    """[B, T] to [Q, B, size]."""
    return x_BT.reshape(x_BT.shape[0], blocks.num_q, blocks.size_q).swapaxes(0, 1)


def _bounds(start, end, size_k: int):
    """For each block of queries the first block of keys that any of them sees, and one past the last."""
    return start.min(axis=(1, 2)) // size_k, -(-end.max(axis=(1, 2)) // size_k)


def _visible(start, end, window, j, size_k: int, rows: int):
    """bool [B, 1, R, size_k]: which keys of block j each query of a block sees."""
    slot = j * size_k + jnp.arange(size_k, dtype=start.dtype)
    visible = (slot >= start[..., None]) & (slot < end[..., None])
    if window is not None:
        positions = jax.lax.dynamic_slice_in_dim(window.positions, j * size_k, size_k, axis=1)
        visible &= positions[:, None] >= window.least[..., None]
    return jnp.tile(visible, (1, rows // start.shape[1], 1))[:, None]


def _block(x, j, size: int):
    return jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks, made, q, k, v, start, end, window):
    return _forward(blocks, made, q, k, v, start, end, window)[0]


def _of_block(window, least):
    return None if window is None else window._replace(least=least)


def _forward(blocks, made, q, k, v, start, end, window):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    size, rows = blocks.size_k, q.shape[3]

    def one(_, block):
        q, start, end, least, first, last = block
        near = _of_block(window, least)

        def add(j, carry):
            top, total, out = carry
            scores = made.of(product("bkrh,bksh->bkrs", q, _block(k, j, size)))
            scores = jnp.where(_visible(start, end, near, j, size, rows), scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            v_block = _block(v, j, size)
            part = product("bkrs,bksh->bkrh", weights.astype(v.dtype), v_block)
            return new_top, total, out * shrink + part

        zero = jnp.zeros((*q.shape[:-1], 1), wide)
        carry = (zero + _LEAST, zero, jnp.zeros(q.shape, wide))
        top, total, out = jax.lax.fori_loop(first, last, add, carry)
        return None, ((out / total).astype(q.dtype), top + jnp.log(total))

    least = None if window is None else window.least
    _, (out, log_total) = jax.lax.scan(one, None, (q, start, end, least, *_bounds(start, end, size)))
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, start, end, window, out, log_total)


def _backward(blocks, made, saved, d_out):
    """Everything with keys before queries: each product then reads its first operand along its rows.

    A matmul whose first operand must be transposed takes several times as long on a CPU.
    """
    q, k, v, start, end, window, out, log_total = saved
    wide = log_total.dtype
    size, rows = blocks.size_k, q.shape[3]
    # Softmax's own correction, sum_s weight d_weight, from what is at hand: out . d_out.
    delta = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1)[..., None, :]  # [Q, B, K, 1, R]
    log_total = log_total.swapaxes(-1, -2)
    k_transposed = k.swapaxes(-1, -2)  # [B, K, H, S]

    def one(carry, block):
        q, start, end, least, d_out, log_total, delta, first, last = block
        near = _of_block(window, least)

        def add(j, carry):
            d_k, d_v, d_q = carry
            scores = made.of(product("bksh,bkrh->bksr", _block(k, j, size), q))
            visible = _visible(start, end, near, j, size, rows).swapaxes(-1, -2)
            weights = jnp.where(visible, jnp.exp(scores - log_total), 0)
            d_weights = product("bksh,bkrh->bksr", _block(v, j, size), d_out)
            d_scores = (sloped(weights * (d_weights - delta), made.slope(scores)) * made.scale).astype(q.dtype)
            d_k = _add_block(d_k, j, d_scores, q)
            d_v = _add_block(d_v, j, weights.astype(v.dtype), d_out)
            k_block = jax.lax.dynamic_slice_in_dim(k_transposed, j * size, size, axis=3)
            return d_k, d_v, d_q + product("bkhs,bksr->bkhr", k_block, d_scores)

        def _add_block(x, j, a, b):
            part = _block(x, j, size) + product("bksr,bkrh->bksh", a, b)
            return jax.lax.dynamic_update_slice_in_dim(x, part, j * size, axis=2)

        zero = jnp.zeros((*q.shape[:2], q.shape[-1], rows), wide)
        *carry, d_q = jax.lax.fori_loop(first, last, add, (*carry, zero))
        return tuple(carry), d_q.astype(q.dtype)

    start_carry = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
    least = None if window is None else window.least
    per_block = (q, start, end, least, d_out, log_total, delta, *_bounds(start, end, size))
    (d_k, d_v), d_q = jax.lax.scan(one, start_carry, per_block)
    return d_q.swapaxes(-1, -2), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attend.defvjp(_forward, _backward)
