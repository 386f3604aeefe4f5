"""Rotary position embeddings: frequencies of each rope type, and the rotation of queries and keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product_precision


@dataclasses.dataclass(frozen=True)
class Yarn:
    """What the type `yarn` adds: which frequencies are divided, and a factor of cosine and sine."""

    beta_fast: float = 32.0  # turns within the original length from which a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided
    truncate: bool = True  # whether the dims at these bounds are whole numbers
    attention_factor: float = 1.0  # of cosine and sine


@dataclasses.dataclass(frozen=True)
class LongRope:
    """What the type `longrope` adds: what each pair's frequency is divided by, and a factor of cosine and sine."""

    short: tuple[float, ...]  # where the longest sequence is within the original length
    long: tuple[float, ...]  # where it is longer
    attention_factor: float = 1.0  # of cosine and sine


@dataclasses.dataclass(frozen=True)
class Rope:
    """What a checkpoint's config says of its rotary embedding.

    `default` uses theta alone, `linear` divides all frequencies by `factor`, `llama3` divides those whose wavelength
    is longer than `original_length / low_freq_factor` and blends up to `original_length / high_freq_factor`, `yarn`
    blends by how often a pair turns within `original_length`. Two depend on the longest sequence that is to be read,
    `length`: `dynamic` raises theta where it is beyond `original_length`, `longrope` then takes other divisors. It is
    stated, never a batch's own, so that a sequence has the same numbers whatever is read beside it.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    yarn: Yarn | None = None
    longrope: LongRope | None = None
    length: int | None = None  # of the longest sequence, for `dynamic` and `longrope`; None: within the original length
    dims: int | None = None  # how many of a head's dims turn, the first ones; None: all
    query_growth: float | None = None  # queries times `1 + query_growth log(1 + floor(position / original_length))`

    @property
    def attention_factor(self) -> float:
        """Of cosine and sine."""
        more = self.yarn or self.longrope
        return 1.0 if more is None else more.attention_factor

    def reads(self, longest: int) -> bool:
        """Whether sequences of this length have their frequencies: false where `length` must be stated first."""
        return self.kind not in BY_LENGTH or self.length is not None or longest <= self.original_length

    def for_length(self, longest: int) -> Rope:
        """The same for sequences of up to this length, where frequencies depend on it and none is stated."""
        if self.kind not in BY_LENGTH or self.length is not None:
            return self
        return dataclasses.replace(self, length=max(longest, self.original_length))


KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
BY_LENGTH = ("dynamic", "longrope")  # whose frequencies depend on the longest sequence


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of head dims that turns: `theta^(-2i/H)`, rescaled as the rope type says.

    Source: RoFormer (arXiv 2104.09864) eq. 15; YaRN (arXiv 2309.00071) section 3.2; `llama3`, `dynamic` and `longrope`
    (arXiv 2402.13753) after transformers' `modeling_rope_utils`.

    Args:
      rope: the rope type and its numbers.
      head_dim: H, even.

    Returns:
      float64 [H / 2], of the dims that turn, for the caller to round once, to the precision of the angles.

    >>> frequencies(Rope(theta=100.0), 4).tolist()
    [1.0, 0.1]
    >>> frequencies(Rope("linear", theta=100.0, factor=2.0), 4).tolist()
    [0.5, 0.05]
    """
    head_dim = head_dim if rope.dims is None else rope.dims
    pairs = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    freq = rope.theta**-pairs
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        # 0 where the wavelength is at least original/low (divided by factor), 1 where at most original/high (kept).
        keep = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        return keep * freq + (1 - keep) * freq / rope.factor
    if rope.kind == "yarn" and rope.yarn is not None:
        # The dim whose pair turns so many times within the original length.
        low, high = (
            head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.yarn.beta_fast, rope.yarn.beta_slow)
        )
        if rope.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        keep = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        return keep * freq + (1 - keep) * freq / rope.factor
    if rope.kind == "dynamic":
        longest = max(rope.length or 0, rope.original_length)
        growth = rope.factor * longest / rope.original_length - (rope.factor - 1)
        return (rope.theta * growth ** (head_dim / (head_dim - 2))) ** -pairs
    if rope.kind == "longrope" and rope.longrope is not None:
        beyond = rope.length is not None and rope.length > rope.original_length
        return freq / np.array(rope.longrope.long if beyond else rope.longrope.short)
    raise ValueError(f"rope type {rope.kind!r} is not one of {', '.join(KINDS)}")


def query_scale(positions: jax.Array, growth: float, original_length: int, dtype: Any) -> jax.Array:
    """`1 + growth log(1 + floor(position / original_length))`, in at least float32 (Llama 4, Ministral 3).

    Args:
      positions: int [B, T].
      growth: of the queries.
      original_length: of the rope.
      dtype: of the computation.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return 1 + growth * jnp.log1p((positions // original_length).astype(wide))


def rotations(
    positions: jax.Array, freq: np.ndarray, dtype: jnp.dtype, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's angles, made once for all layers.

    Args:
      positions: int [B, T].
      freq: [H / 2], radians per position.
      dtype: of the computation; angles are in at least float32, since a position times a frequency needs the digits.
      factor: of both.

    Returns:
      (cos, sin), each [B, T, H / 2] in at least float32.
    """
    chex.assert_rank(positions, 2)
    dtype = jnp.promote_types(dtype, jnp.float32)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(freq, dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def computed_once(rotation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The same, as the result of a loop, which the compiler keeps.

    Where layers are no loop themselves, a CPU's compiler takes sines for cheap and makes them anew in every layer and
    for every head.
    """
    cos, sin = rotation
    both = jax.lax.map(lambda first: jnp.where(first, cos, sin), jnp.array([True, False]))
    return both[0], both[1]


def rotate(x_BTNH: jax.Array, cos_BTF: jax.Array, sin_BTF: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + F) of the first 2 F head dims by its angle, in the precision of `cos`; the halves
    convention.

    Args:
      x_BTNH: queries or keys [B, T, N, H].
      cos_BTF: [B, T, F], F mostly H / 2.
      sin_BTF: [B, T, F].

    Returns:
      [B, T, N, H], dtype of `x_BTNH`.
    """
    chex.assert_rank([x_BTNH, cos_BTF, sin_BTF], [4, 3, 3])
    if platform() == "tpu":
        return _rotate_lanes(x_BTNH, cos_BTF, sin_BTF)
    cos, sin = cos_BTF[:, :, None, :], sin_BTF[:, :, None, :]
    turned = 2 * cos.shape[-1]
    x, rest = (x_BTNH, []) if turned == x_BTNH.shape[-1] else (x_BTNH[..., :turned], [x_BTNH[..., turned:]])
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([out, *rest], axis=-1) if rest else out


@jax.custom_vjp
def _rotate_lanes(x_BTNH, cos_BTF, sin_BTF):
    """`rotate` without arrays of half of the head dims, which a TPU keeps in float32 in twice their room.

    `x cos + (x P) sin`, where P is the exchange of the two halves with the sign of the first: the product has one term
    each and is exact. Dims that do not turn have cosine 1 and sine 0.
    """
    half = np.eye(cos_BTF.shape[-1])
    zero = np.zeros_like(half)
    rest = x_BTNH.shape[-1] - 2 * len(half)
    exchange = jnp.asarray(np.pad(np.block([[zero, half], [-half, zero]]), (0, rest)), x_BTNH.dtype)
    # With a batch dim, of size 1, since rematerialisation policies save products without one.
    exchanged = jax.lax.dot_general(
        x_BTNH[None], exchange[None], (((4,), (1,)), ((0,), (0,))), precision=product_precision(x_BTNH.dtype)
    )[0]
    cos, sin = (jnp.concatenate([y, y], axis=-1)[:, :, None, :] for y in (cos_BTF, sin_BTF))
    if rest:
        keep = ((0, 0), (0, 0), (0, 0), (0, rest))
        cos, sin = jnp.pad(cos, keep, constant_values=1), jnp.pad(sin, keep)
    return (x_BTNH.astype(cos.dtype) * cos + exchanged.astype(cos.dtype) * sin).astype(x_BTNH.dtype)


def _forward(x, cos, sin):
    return _rotate_lanes(x, cos, sin), (cos, sin)


def _backward(rotation, d_x):
    cos, sin = rotation
    # Angles are made of positions: nothing learns through them.
    return _rotate_lanes(d_x, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate_lanes.defvjp(_forward, _backward)
