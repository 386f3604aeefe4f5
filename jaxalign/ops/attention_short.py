"""Attention of short rows on a CPU: few blocks of queries, each with all keys that it can see, all worked on at once.

A batched matmul of many small matrices keeps one core of a CPU busy, and so do the loops of `attention_blocked`. Here
rows, heads and blocks of queries make units of work that do not wait for each other, so that all cores are busy. A
unit's scores exist as a whole, which short rows allow. What a unit skips is fixed at compile time: the keys after its
queries, where rows are known to be causal.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.ops.attention_blocked import SAVED, blocked_attention
from jaxalign.ops.attention_scores import Scores, sloped
from jaxalign.ops.attention_shards import on_each_device
from jaxalign.ops.precision import product

LIMIT = 512  # tokens of a row; beyond it the loops of `attention_blocked` skip more than is won here
_UNITS = 8  # at least, where rows and heads are as many: enough for several cores, few enough to compile
_MOST_WEIGHTS = 2**23  # that are kept for the backward pass of a layer: 32 MiB of float32


class _Unit(NamedTuple):
    """Some queries of some rows and heads, and the keys that they read, the first ones."""

    row: slice
    head: slice
    queries: slice
    keys: slice

    def of_queries(self, x):
        """Of [B, K, G, T, ...]."""
        return x[self.row, self.head, :, self.queries]

    def of_keys(self, x):
        """Of [B, K, S, H]."""
        return x[self.row, self.head, self.keys]

    def inside(self, start, end, slots):
        """bool [b, 1, 1, n, s]: which of the keys lie in each query's interval."""
        slot = slots[self.row, None, self.keys]
        start, end = (x[self.row, self.queries, None] for x in (start, end))
        return ((slot >= start) & (slot < end))[:, None, None]

    def visible(self, start, end, slots, window):
        """bool [b, 1, 1, n, s]: which of the keys each query sees."""
        inside = self.inside(start, end, slots)
        if window is None:
            return inside
        near = window.positions[self.row, None, self.keys] >= window.least[self.row, self.queries, None]
        return inside & near[:, None, None]

    def complete(self, start, end, slots):
        """bool [b, 1, 1, n, 1]: whether each query's interval is among the keys."""
        seen = self.inside(start, end, slots).sum(axis=-1, keepdims=True, dtype=end.dtype)
        return seen == (end - start)[self.row, None, None, self.queries, None]


def short_attention(
    q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS=None, window=None, *, scores: Scores, causal: bool
):
    """`attention` for rows of at most `LIMIT` tokens; see there for the other arguments.

    Args:
      causal: as many keys as queries, and no token sees a later one; one that would gets NaN where keys are left out.
    """
    local = functools.partial(_local, causal, scores)
    return on_each_device(local, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS, window)


def _local(causal, made, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS, window):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if slots_BS is None:
        if not fits(B, T, S, N):
            return blocked_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, window, scores=made)
        slots_BS = jnp.broadcast_to(jnp.arange(S, dtype=start_BT.dtype), (B, S))
    q = q_BTNH.reshape(B, T, K, N // K, H)
    return _attend(causal, made, q, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS, window).reshape(B, T, N, H)


def fits(rows: int, num_queries: int, num_keys: int, heads: int) -> bool:
    """Whether the weights of a layer may be kept; else the loops of `attention_blocked` take over."""
    return rows * heads * num_queries * num_keys <= _MOST_WEIGHTS


def _blocks(num_queries: int, num_keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Queries in blocks, of eights of tokens, and their keys; in one where all keys are read anyway."""
    if not causal:
        return [(slice(0, num_queries), slice(0, num_keys))]
    num = 2 if num_queries < 192 else 4
    edges = sorted({min(-(-num_queries * i // (8 * num)) * 8, num_queries) for i in range(num + 1)})
    return [(slice(a, b), slice(0, b)) for a, b in itertools.pairwise(edges)]


def _units(q, k, causal: bool) -> list[list[_Unit]]:
    """By rows and heads, in the order of `_whole`, the units of all their queries."""
    B, K, _, T, _ = q.shape
    blocks = _blocks(T, k.shape[2], causal)
    # Rows in parts, and heads where rows are few; four at least with blocks, which are of unequal work.
    most = max(_UNITS // len(blocks), 4)
    rows = max(n for n in range(1, most + 1) if B % n == 0)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and n * rows <= most)
    return [
        [
            _Unit(slice(i * B // rows, (i + 1) * B // rows), slice(j * K // heads, (j + 1) * K // heads), *b)
            for b in blocks
        ]
        for i in range(rows)
        for j in range(heads)
    ]


def _whole(of_parts, parts: list[list[_Unit]]):
    """[B, K, ...] from what each part gives."""
    across = sum(units[0].row.start == 0 for units in parts)
    lines = [of_parts[i : i + across] for i in range(0, len(parts), across)]
    return jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines], axis=0)


def _by_head(x):
    """[B, T, K, ..., H] as [B, K, ..., T, H]."""
    return jnp.moveaxis(x, 1, -2)


def _by_token(x):
    """[B, K, ..., T, H] as [B, T, K, ..., H]."""
    return jnp.moveaxis(x, -2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal, made, q, k, v, start, end, slots, window):
    return _forward(causal, made, q, k, v, start, end, slots, window)[0]


def _forward(causal, made, q, k, v, start, end, slots, window):
    q, k, v = (_by_head(x) for x in (q, k, v))
    parts = _units(q, k, causal)
    outs, kept = [], []
    for units in parts:
        results = [
            _unit_forward(
                *(u.of_queries(q), u.of_keys(k), u.of_keys(v)),
                made,
                u.visible(start, end, slots, window),
                u.complete(start, end, slots) if causal else True,
            )
            for u in units
        ]
        outs.append(jnp.concatenate([out for out, *_ in results], axis=3))
        kept.append([weights for _, *weights in results])
    out = checkpoint_name(_by_token(_whole(outs, parts)), SAVED)
    return out, (q, k, v, out, kept)


def _unit_forward(q, k, v, made, visible, complete):
    """The output, and the softmax's exponentials and their sums: keeping them saves the fifth product backward."""
    b, K, G, n, H = q.shape
    scores = made.of(product("bkrh,bksh->bkrs", q.reshape(b, K, G * n, H), k))
    slope = made.slope(scores)
    scores = jnp.where(visible, scores.reshape(b, K, G, n, -1), -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = jnp.where(complete, weights.sum(axis=-1, keepdims=True), jnp.nan)  # better no number than a wrong one
    weights, total = (x.reshape(b, K, G * n, -1) for x in (weights, total))
    out = product("bkrs,bksh->bkrh", weights.astype(v.dtype), v) / total
    return out.reshape(b, K, G, n, H).astype(q.dtype), weights, total, slope


def _backward(causal, made, saved, d_out):
    q, k, v, out, kept = saved
    parts = _units(q, k, causal)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Softmax's own correction, sum_s weight d_weight, from what is at hand: out . d_out, both still in one order.
    delta = _by_head(jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1, keepdims=True))
    d_out = _by_head(d_out)
    of_queries, of_keys, of_values = [], [], []
    for units, weights in zip(parts, kept, strict=True):
        triples = [
            _unit_backward(
                *(u.of_queries(q), u.of_keys(k), u.of_keys(v)),
                *(u.of_queries(d_out), u.of_queries(delta)),
                made.scale,
                *of_unit,
            )
            for u, of_unit in zip(units, weights, strict=True)
        ]
        d_q, d_k, d_v = zip(*triples, strict=True)
        of_queries.append(jnp.concatenate(d_q, axis=3))
        of_keys.append(_sum(d_k))
        of_values.append(_sum(d_v))
    d_q, d_k, d_v = (_by_token(_whole(x, parts)) for x in (of_queries, of_keys, of_values))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None, None


def _unit_backward(q, k, v, d_out, delta, scale, weights, total, slope):
    """Each product reads its first operand along its rows; what has to be transposed for that is narrow."""
    b, K, G, n, H = q.shape
    q, d_out, delta = (x.reshape(b, K, G * n, -1) for x in (q, d_out, delta))
    d_out = d_out / total
    d_weights = product("bkrh,bkhs->bkrs", d_out.astype(v.dtype), v.swapaxes(-1, -2))
    d_scores = sloped(weights * (d_weights - delta / total), slope).astype(q.dtype)
    d_q = product("bkrs,bksh->bkrh", d_scores, k) * scale
    d_k = product("bkhr,bkrs->bkhs", q.swapaxes(-1, -2), d_scores) * scale
    d_v = product("bkhr,bkrs->bkhs", d_out.astype(v.dtype).swapaxes(-1, -2), weights.astype(v.dtype))
    return d_q.reshape(b, K, G, n, H).astype(q.dtype), d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2)


def _sum(of_blocks):
    """The sum of what blocks of queries give to the keys that each has read, the first ones; the last has read all.

    Added in place: a sum of padded arrays becomes one loop that asks at every number which of them it is in.
    """
    *others, total = of_blocks
    for x in reversed(others):
        total = total.at[:, :, : x.shape[2]].add(x)
    return total


_attend.defvjp(_forward, _backward)
