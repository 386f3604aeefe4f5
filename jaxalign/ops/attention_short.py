"""Attention of short rows on a CPU: few blocks of queries, each with all keys that it can see, all worked on at once.

A CPU's products of many small matrices keep one core busy, and so do the loops of `attention_blocked`. Here rows, heads
and blocks of queries make units of work that do not wait for each other, so that all cores are busy. A unit's scores
exist as a whole, which short rows allow. What a unit leaves out is fixed when it is compiled: the keys behind its
queries, where rows are known to be causal.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.attention_shards import on_each_device
from jaxalign.ops.precision import product

LIMIT = 512  # tokens of a row; beyond it the loops of `attention_blocked` skip more than is won here
_UNITS = 8  # at least, where rows and heads are as many: enough for several cores, few enough to compile


class _Part(NamedTuple):
    """Some rows and heads of keys."""

    row: slice
    head: slice

    def of(self, x):
        """Of [B, K, ...]."""
        return x[self.row, self.head]


class _Block(NamedTuple):
    """Some queries and the keys that they may see."""

    queries: slice
    keys: slice


def short_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, *, causal: bool):
    """`attention` for rows of at most `LIMIT` tokens; see there for the other arguments.

    Args:
      causal: as many keys as queries, and no token sees a later one; one that would gets NaN.
    """
    return on_each_device(functools.partial(_local, causal), q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _local(causal, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out = _attend(causal, q, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), start_BT, end_BT)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _blocks(num_queries: int, num_keys: int, causal: bool) -> list[_Block]:
    """Queries in blocks, of eights of tokens; in one where all keys are read anyway."""
    if not causal:
        return [_Block(slice(0, num_queries), slice(0, num_keys))]
    num = 2 if num_queries < 192 else 4
    edges = sorted({min(-(-num_queries * i // (8 * num)) * 8, num_queries) for i in range(num + 1)})
    return [_Block(slice(a, b), slice(0, b)) for a, b in itertools.pairwise(edges)]


def _parts(B: int, K: int, num_blocks: int) -> list[_Part]:
    """Rows in parts, and heads where rows are few; four at least with blocks, which are of unequal work."""
    most = max(_UNITS // num_blocks, 4)
    rows = max(n for n in range(1, most + 1) if B % n == 0)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and n * rows <= most)
    return [
        _Part(slice(i * B // rows, (i + 1) * B // rows), slice(j * K // heads, (j + 1) * K // heads))
        for i in range(rows)
        for j in range(heads)
    ]


def _whole(of_parts, parts):
    """The inverse of `_Part.of` for all parts."""
    across = sum(part.row.start == 0 for part in parts)
    lines = [of_parts[i : i + across] for i in range(0, len(parts), across)]
    return jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines], axis=0)


def _visible(start, end, part: _Part, block: _Block):
    """bool [b, 1, 1, n, s]: which keys each query of a block sees."""
    slot = jnp.arange(block.keys.stop, dtype=start.dtype)
    start, end = (x[part.row, block.queries, None] for x in (start, end))
    return ((slot >= start) & (slot < end))[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, q, k, v, start, end):
    return _forward(causal, q, k, v, start, end)[0]


def _forward(causal, q, k, v, start, end):
    blocks = _blocks(q.shape[3], k.shape[2], causal)
    parts = _parts(*k.shape[:2], len(blocks))
    outs, log_totals = [], []
    for part in parts:
        pairs = [
            _unit_forward(
                part.of(q)[..., block.queries, :],
                part.of(k)[:, :, block.keys],
                part.of(v)[:, :, block.keys],
                _visible(start, end, part, block),
            )
            for block in blocks
        ]
        out, log_total = (jnp.concatenate(x, axis=3) for x in zip(*pairs, strict=True))
        outs.append(out)
        log_totals.append(log_total)
    out, log_total = _whole(outs, parts), _whole(log_totals, parts)
    if causal:  # keys behind the query are not read: better no number than a wrong one
        behind = end > jnp.arange(1, end.shape[1] + 1, dtype=end.dtype)
        out, log_total = (jnp.where(behind[:, None, None, :, None], jnp.nan, x) for x in (out, log_total))
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, start, end, out, log_total)


def _unit_forward(q, k, v, visible):
    b, K, G, n, H = q.shape
    scores = product("bkrh,bksh->bkrs", q.reshape(b, K, G * n, H), k) * H**-0.5
    scores = jnp.where(visible, scores.reshape(b, K, G, n, -1), -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = product("bkrs,bksh->bkrh", weights.astype(v.dtype).reshape(b, K, G * n, -1), v)
    log_total = top + jnp.log(total)
    # The total's logarithm has its part in the output, so that a pass without gradients, which has no other use for it,
    # is the same program as one with them, and has the same result to the last bit.
    out = jnp.where(jnp.isnan(log_total), jnp.nan, out.reshape(b, K, G, n, H) / total)
    return out.astype(q.dtype), log_total


def _backward(causal, saved, d_out):
    q, k, v, start, end, out, log_total = saved
    blocks = _blocks(q.shape[3], k.shape[2], causal)
    parts = _parts(*k.shape[:2], len(blocks))
    # Softmax's own correction, sum_s weight d_weight, from what is at hand: out . d_out.
    delta = jnp.sum(out.astype(log_total.dtype) * d_out.astype(log_total.dtype), axis=-1)
    log_total = log_total[..., 0]
    of_queries, of_keys, of_values = [], [], []
    for part in parts:
        triples = [
            _unit_backward(
                part.of(q)[..., block.queries, :],
                part.of(k)[:, :, block.keys],
                part.of(v)[:, :, block.keys],
                part.of(d_out)[..., block.queries, :],
                part.of(log_total)[..., block.queries],
                part.of(delta)[..., block.queries],
                _visible(start, end, part, block),
            )
            for block in blocks
        ]
        d_q, d_k, d_v = zip(*triples, strict=True)
        of_queries.append(jnp.concatenate(d_q, axis=3))
        of_keys.append(_sum(d_k, k.shape[2]))
        of_values.append(_sum(d_v, k.shape[2]))
    d_q, d_k, d_v = (_whole(x, parts) for x in (of_queries, of_keys, of_values))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _unit_backward(q, k, v, d_out, log_total, delta, visible):
    """Everything with keys before queries: each product then reads its first operand along its rows."""
    b, K, G, n, H = q.shape
    q, d_out = (x.reshape(b, K, G * n, H) for x in (q, d_out))
    log_total, delta = (x.reshape(b, K, 1, G * n) for x in (log_total, delta))
    visible = jnp.broadcast_to(visible, (b, 1, G, n, k.shape[2])).reshape(b, 1, G * n, -1).swapaxes(-1, -2)
    scores = product("bksh,bkrh->bksr", k, q) * H**-0.5
    weights = jnp.where(visible, jnp.exp(scores - log_total), 0)
    d_weights = product("bksh,bkrh->bksr", v, d_out)
    d_scores = (weights * (d_weights - delta) * H**-0.5).astype(q.dtype)
    d_q = product("bkhs,bksr->bkhr", k.swapaxes(-1, -2), d_scores).swapaxes(-1, -2)
    d_k = product("bksr,bkrh->bksh", d_scores, q)
    d_v = product("bksr,bkrh->bksh", weights.astype(v.dtype), d_out)
    return d_q.reshape(b, K, G, n, H).astype(q.dtype), d_k, d_v


def _sum(of_blocks, length: int):
    """The sum of what blocks of queries give to the keys that each has read."""
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))) for x in of_blocks)
    return functools.reduce(jnp.add, padded)


_attend.defvjp(_forward, _backward)
