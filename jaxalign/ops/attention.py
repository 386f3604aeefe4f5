"""Attention over rows in which each token sees one half-open interval of keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxalign.errors import InputError
from jaxalign.ops import attention_mosaic, attention_short, attention_splash
from jaxalign.ops.attention_blocked import blocked_attention
from jaxalign.ops.attention_mosaic import mosaic_attention
from jaxalign.ops.attention_short import short_attention
from jaxalign.ops.attention_splash import splash_attention
from jaxalign.ops.attention_triton import triton_attention
from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    *,
    slots_BS: jax.Array | None = None,
    backend: str = "plain",
) -> jax.Array:
    """Softmax attention in which query t sees the keys `start[t] <= s < end[t]`.

    `out[t, n] = sum_s softmax_s(q[t, n] . k[s, n // (N / K)] / sqrt(H)) v[s, n // (N / K)]`, the softmax in at least
    float32 (Attention Is All You Need, eq. 1; grouped queries: arXiv 2305.13245).

    An interval must not be empty: the result is then NaN, rather than the average of all keys.

    Args:
      q_BTNH: queries [B, T, N, H].
      k_BSKH: keys [B, S, K, H]; K divides N.
      v_BSKH: values [B, S, K, H].
      start_BT: int [B, T], first visible key.
      end_BT: int [B, T], one past the last visible key, at most S.
      slots_BS: int [B, S], the number by which intervals count each key of a row, where that is not its index; for the
        backends "plain", "short" and "causal".
      backend: a name in `BACKENDS`.

    Returns:
      [B, T, N, H], dtype of the queries.

    Raises:
      KeyError: unknown backend.
      ValueError: one that takes no `slots_BS`.
    """
    chex.assert_rank([q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT], [4, 4, 4, 2, 2])
    chex.assert_equal_shape([k_BSKH, v_BSKH])
    chex.assert_type([start_BT, end_BT], int)
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads in {k_BSKH.shape[2]} groups")
    order = () if slots_BS is None else (slots_BS,)
    if order and backend not in ("plain", "short", "causal"):
        raise ValueError(f"attention {backend!r} takes keys in the order of their numbers")
    return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, *order)


def choose_backend(num_queries: int, num_keys: int, dtype, *, causal: bool = False, asked: str | None = None) -> str:
    """The backend for a shape: blocks pay as soon as there are several to skip or to keep out of memory.

    A TPU takes JAX's splash kernels, an NVIDIA GPU from Ampere on our Triton kernels. What they cannot do (64 bits,
    rows beyond `attention_splash.LIMIT`) goes the way of a CPU, where XLA's products do the blocks: one by one, or all
    at once where rows are short. The Mosaic kernels, for Hopper, wait to be asked for until a card has run them.

    Args:
      num_queries: T.
      num_keys: S.
      dtype: of the queries.
      causal: whether no token of any row sees a later one.
      asked: the backend for all but the shortest.

    >>> choose_backend(1, 4096, "float32"), choose_backend(1024, 1024, "float32")
    ('plain', 'blocked')
    >>> choose_backend(256, 256, "float32"), choose_backend(256, 256, "float32", causal=True)
    ('short', 'causal')
    """
    if min(num_queries, num_keys) < 96:
        return "plain"
    if asked:
        return asked
    if platform() == "cpu" and max(num_queries, num_keys) <= attention_short.LIMIT:
        return "causal" if causal and num_queries == num_keys else "short"
    kind = platform() if jnp.dtype(dtype).itemsize <= 4 else "any"
    if kind == "tpu" and max(num_queries, num_keys) <= attention_splash.LIMIT:
        return "splash"
    return "triton" if kind == "gpu" and _generation() >= 8 else "blocked"


def require_backend(asked: str | None, device: Any, dtype, head_dim: int) -> None:
    """Refuses a backend that a device does not run, before anything is compiled.

    Args:
      asked: a name in `BACKENDS`; None passes.
      device: of the run.
      dtype: of the computation.
      head_dim: H.

    Raises:
      InputError: saying what it needs.
    """
    needs = _NEEDS.get(asked or "")
    wide = jnp.dtype(dtype).itemsize > 2 or head_dim > attention_mosaic.LIMIT
    if needs and (device.platform != needs[0] or (asked == "mosaic" and wide)):
        raise InputError(
            f"model.attention={asked} on {device.device_kind} in {dtype} with heads of {head_dim}",
            needs[1],
            "--config.model.attention=None, which takes what suits the device",
        )


_NEEDS = {
    "splash": ("tpu", "a TPU"),
    "triton": ("gpu", "an NVIDIA GPU"),
    "mosaic": ("gpu", f"an NVIDIA Hopper GPU, bfloat16 or float16, heads of at most {attention_mosaic.LIMIT}"),
}


def _generation() -> int:
    """Of the NVIDIA GPU (8 Ampere, 9 Hopper, 10 and 12 Blackwell); a target topology, for which a program is
    compiled, is a Hopper."""
    return int(float(getattr(jax.local_devices()[0], "compute_capability", None) or 9))


def plain_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS=None):
    """All scores at once, in XLA's own matrix products; the reference for every other backend."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K  # queries that share a key: they become rows of one product, so keys are never repeated in memory
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores = product("bkrh,bksh->bkrs", q_BKRH, k_BKSH) * H**-0.5
    slot = jnp.arange(S, dtype=start_BT.dtype) if slots_BS is None else slots_BS[:, None]
    visible_BTS = (slot >= start_BT[..., None]) & (slot < end_BT[..., None])
    scores = jnp.where(visible_BTS[:, None, None], scores.reshape(B, K, G, T, S), -jnp.inf)
    # The division comes after the sum over keys: T x H numbers instead of T x S. The largest score only shifts.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    out = product("bkrs,bksh->bkrh", weights, v_BKSH).reshape(B, K, G, T, H) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "plain": plain_attention,
    "blocked": blocked_attention,
    "short": functools.partial(short_attention, causal=False),
    "causal": functools.partial(short_attention, causal=True),
    "splash": splash_attention,
    "triton": triton_attention,
    "mosaic": mosaic_attention,
}
