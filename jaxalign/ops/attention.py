"""Attention over rows in which each token sees one half-open interval of keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.errors import InputError
from jaxalign.ops import attention_mosaic, attention_short, attention_splash
from jaxalign.ops.attention_blocked import blocked_attention
from jaxalign.ops.attention_mosaic import mosaic_attention
from jaxalign.ops.attention_scores import Scores, Window
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
    scale: float | None = None,
    softcap: float | None = None,
    window: int | jax.Array | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    backend: str = "plain",
) -> jax.Array:
    """Softmax attention in which query t sees the keys `start[t] <= s < end[t]`.

    `out[t, n] = sum_s softmax_s(scale q[t, n] . k[s, n // (N / K)]) v[s, n // (N / K)]`, the softmax in at least
    float32 (Attention Is All You Need, eq. 1; grouped queries: arXiv 2305.13245). With a cap `c` the score z becomes
    `c tanh(z / c)` (Gemma 2, arXiv 2408.00118). With a window only keys of `position_q - position_k < window` are seen.

    An interval must not be empty: the result is then NaN, rather than the average of all keys.

    Args:
      q_BTNH: queries [B, T, N, H].
      k_BSKH: keys [B, S, K, H]; K divides N.
      v_BSKH: values [B, S, K, H].
      start_BT: int [B, T], first visible key.
      end_BT: int [B, T], one past the last visible key, at most S.
      slots_BS: int [B, S], the number by which intervals count each key of a row, where that is not its index; for the
        backends "plain", "short" and "causal".
      scale: of the scores; None: 1 / sqrt(H).
      softcap: c, the largest score; None: none.
      window: how many positions back a query sees, its own among them, at least 1; None: all. It may be an array, such
        as a layer's own number.
      positions: of the queries [B, T] and of the keys [B, S], which a window counts.
      backend: a name in `BACKENDS`.

    Returns:
      [B, T, N, H], dtype of the queries.

    Raises:
      KeyError: unknown backend.
      ValueError: one that takes no `slots_BS`, or a window without positions.
      InputError: a backend that has no caps, or no windows.
    """
    chex.assert_rank([q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT], [4, 4, 4, 2, 2])
    chex.assert_equal_shape([k_BSKH, v_BSKH])
    chex.assert_type([start_BT, end_BT], int)
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads in {k_BSKH.shape[2]} groups")
    if window is not None and positions is None:
        raise ValueError("a window counts positions: give those of the queries and of the keys")
    can = CAPABILITIES[backend]
    more: dict[str, Any] = {}
    _require(backend, softcap=softcap is not None, window=window is not None)
    if slots_BS is not None and not can.slots:
        raise ValueError(f"attention {backend!r} takes keys in the order of their numbers")
    if can.slots:
        more["slots_BS"] = slots_BS
    if can.window:
        more["window"] = None if window is None else Window(positions[0] - window + 1, positions[1])
    scores = Scores(q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale), softcap)
    return BACKENDS[backend](q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, scores=scores, **more)


def choose_backend(
    num_queries: int,
    num_keys: int,
    dtype,
    *,
    causal: bool = False,
    asked: str | None = None,
    softcap: bool = False,
    window: bool = False,
) -> str:
    """The backend for a shape: blocks pay as soon as there are several to skip or to keep out of memory.

    A TPU takes JAX's splash kernels, an NVIDIA GPU from Ampere on our Triton kernels. What they cannot do (64 bits,
    rows beyond `attention_splash.LIMIT`) takes the CPU's backends, XLA matmuls of blocks: in a loop, or all at once
    where rows are short. The Mosaic kernels, for Hopper, wait to be asked for until a card has run them.

    Args:
      num_queries: T.
      num_keys: S.
      dtype: of the queries.
      causal: whether no token of any row sees a later one.
      asked: the backend for all but the shortest.
      softcap: whether scores are capped.
      window: whether a window leaves keys out.

    Raises:
      InputError: the one that is asked for cannot cap scores, or has no windows.

    >>> choose_backend(1, 4096, "float32"), choose_backend(1024, 1024, "float32")
    ('plain', 'blocked')
    >>> choose_backend(256, 256, "float32"), choose_backend(256, 256, "float32", causal=True)
    ('short', 'causal')
    """
    if min(num_queries, num_keys) < 96:
        return "plain"
    if asked:
        _require(asked, softcap=softcap, window=window)
        return asked
    longest, width = max(num_queries, num_keys), jnp.dtype(dtype).itemsize
    for name in ("causal", "short", "splash", "triton"):
        can = CAPABILITIES[name]
        fits = longest <= (can.longest or longest) and width <= can.widest and platform() in can.platforms
        if name == "causal" and not (causal and num_queries == num_keys):
            continue
        if name == "triton" and platform() == "gpu" and _generation() < 8:
            continue
        if fits and can.softcap >= softcap and can.window >= window:
            return name
    return "blocked"


def require_backend(
    asked: str | None, device: Any, dtype, head_dim: int, *, softcap: bool = False, window: bool = False
) -> None:
    """Refuses a backend that a device does not run, or that cannot do what a model asks of it, before anything is
    compiled.

    Args:
      asked: a name in `BACKENDS`; None passes.
      device: of the run.
      dtype: of the computation.
      head_dim: H.
      softcap: whether scores are capped.
      window: whether a window leaves keys out.

    Raises:
      InputError: saying what it needs.
    """
    if asked is None:
        return
    can = CAPABILITIES[asked]
    wide = jnp.dtype(dtype).itemsize > can.widest
    if device.platform not in can.platforms or wide or head_dim > (can.head_dim or head_dim):
        raise InputError(
            f"model.attention={asked} on {device.device_kind} in {dtype} with heads of {head_dim}",
            can.words,
            "--config.model.attention=None, which takes what suits the device",
        )
    _require(asked, softcap=softcap, window=window)


class Capabilities(NamedTuple):
    """What a backend can do; the chooser takes none that cannot do what is asked of it."""

    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    widest: int = 8  # bytes of a number
    head_dim: int | None = None  # at most
    longest: int | None = None  # row, at most
    softcap: bool = True
    window: bool = True
    slots: bool = False  # whether keys may stand in another order than intervals count them
    words: str = ""  # what it needs, where it does not run everywhere


CAPABILITIES: dict[str, Capabilities] = {
    "plain": Capabilities(slots=True),
    "blocked": Capabilities(),
    "short": Capabilities(("cpu",), longest=attention_short.LIMIT, slots=True),
    "causal": Capabilities(("cpu",), longest=attention_short.LIMIT, slots=True),
    "splash": Capabilities(("tpu",), 4, longest=attention_splash.LIMIT, window=False, words="a TPU"),
    "triton": Capabilities(("gpu",), 4, window=False, words="an NVIDIA GPU"),
    "mosaic": Capabilities(
        ("gpu",),
        2,
        attention_mosaic.LIMIT,
        softcap=False,
        window=False,
        words=f"an NVIDIA Hopper GPU, bfloat16 or float16, heads of at most {attention_mosaic.LIMIT}",
    ),
}


def _require(backend: str, **features: bool) -> None:
    """Refuses a backend that cannot do what is asked of it."""
    if lacking := [name for name, asked in features.items() if asked and not getattr(CAPABILITIES[backend], name)]:
        able = [name for name, can in CAPABILITIES.items() if all(getattr(can, feature) for feature in lacking)]
        raise InputError(
            f"attention {backend} for a model with a {' and a '.join(lacking)}",
            f"a backend that has it: {', '.join(able)}",
            "--config.model.attention=None, which takes what suits the model and the device",
        )


def _generation() -> int:
    """Of the NVIDIA GPU (8 Ampere, 9 Hopper, 10 and 12 Blackwell); a target topology, for which a program is
    compiled, is a Hopper."""
    return int(float(getattr(jax.local_devices()[0], "compute_capability", None) or 9))


def plain_attention(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, slots_BS=None, window=None, *, scores: Scores):
    """All scores at once, as XLA matmuls; the reference for every other backend."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K  # queries that share a key: they become rows of one product, so keys are never repeated in memory
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    z = scores.of(product("bkrh,bksh->bkrs", q_BKRH, k_BKSH))
    slot = jnp.arange(S, dtype=start_BT.dtype) if slots_BS is None else slots_BS[:, None]
    visible_BTS = (slot >= start_BT[..., None]) & (slot < end_BT[..., None])
    if window is not None:
        visible_BTS &= window.positions[:, None] >= window.least[..., None]
    z = jnp.where(visible_BTS[:, None, None], z.reshape(B, K, G, T, S), -jnp.inf)
    # The division comes after the sum over keys: T x H numbers instead of T x S. The largest score only shifts.
    weights = jnp.exp(z - jax.lax.stop_gradient(z.max(axis=-1, keepdims=True)))
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
