"""Attention over rows in which each token sees one half-open interval of keys."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    backend: str = "plain",
) -> jax.Array:
    """Softmax attention in which query t sees the keys `start[t] <= s < end[t]`.

    `out[t, n] = sum_s softmax_s(q[t, n] . k[s, n // (N / K)] / sqrt(H)) v[s, n // (N / K)]`, the softmax in at least
    float32 (Attention Is All You Need, eq. 1; grouped queries: arXiv 2305.13245).

    An interval must not be empty: the plain backend then gives NaN, rather than the average of all keys.

    Args:
      q_BTNH: queries [B, T, N, H].
      k_BSKH: keys [B, S, K, H]; K divides N.
      v_BSKH: values [B, S, K, H].
      start_BT: int [B, T], first visible key.
      end_BT: int [B, T], one past the last visible key.
      backend: a name in `BACKENDS`.

    Returns:
      [B, T, N, H], dtype of the queries.

    Raises:
      KeyError: unknown backend.
    """
    chex.assert_rank([q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT], [4, 4, 4, 2, 2])
    chex.assert_equal_shape([k_BSKH, v_BSKH])
    chex.assert_type([start_BT, end_BT], int)
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads in {k_BSKH.shape[2]} groups")
    return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def _plain(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    """All scores at once, in XLA's own matrix products; the reference for every other backend."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)  # G queries share a key: no repeated keys in memory
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * H**-0.5
    slot = jnp.arange(S, dtype=start_BT.dtype)
    visible_BTS = (slot >= start_BT[..., None]) & (slot < end_BT[..., None])
    scores = jnp.where(visible_BTS[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH, preferred_element_type=wide)
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"plain": _plain}
