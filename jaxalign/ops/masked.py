"""Masked reductions: a masked number never enters, not even as a NaN, and neither does its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32


def masked_sum(values: jax.Array, weights: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Sum of values, weighted, without the masked ones: sum_i w_i x_i over w_i != 0.

    Args:
      values: any shape.  A masked value may be anything, NaN included.
      weights: bool mask or weights, same shape or broadcastable to it; 0 or False leaves a value out.
      axis: dims to reduce; None for all.

    Returns:
      The sum, in at least float32.

    >>> print(masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])))
    4.0
    """
    values = at_least_float32(values)
    weights = jnp.broadcast_to(weights, values.shape)
    kept = jnp.where(weights != 0, values, 0)
    return jnp.sum(kept * weights.astype(values.dtype), axis=axis)


def masked_mean(values: jax.Array, weights: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Weighted mean over what is not masked; 0 where everything is.

    Args and dtypes as `masked_sum`.

    >>> print(masked_mean(jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])))
    2.0
    """
    weights = jnp.broadcast_to(weights, values.shape)
    total = jnp.sum(weights, axis=axis, dtype=at_least_float32(values).dtype)
    return masked_sum(values, weights, axis) / jnp.where(total == 0, 1, total)


def masked_var(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Biased variance over what is not masked, sum_i w_i (x_i - mean)^2 / sum_i w_i; 0 where everything is.

    Biased (no Bessel correction), so that one value has variance 0 instead of NaN.

    >>> print(masked_var(jnp.array([1.0, 9.0, 3.0]), jnp.array([True, False, True])))
    1.0
    """
    values = jnp.where(weights != 0, at_least_float32(values), 0)
    return masked_mean(jnp.square(values - masked_mean(values, weights)), weights)


def whiten(values: jax.Array, weights: jax.Array, *, shift_mean: bool = True, eps: float = 1e-8) -> jax.Array:
    """Values scaled to unit variance over what is not masked: (x - mean) / sqrt(var + eps).

    The statistics are over the whole array, which under `jit` is the global batch, whatever the mesh.  The variance is
    biased and eps is inside the root (as in lm-human-preferences; TRL 1.12 whitens each rank alone, with Bessel).

    Args:
      values: any shape.
      weights: bool mask or weights, same shape.
      shift_mean: False keeps the mean: (x - mean) / sqrt(var + eps) + mean.
      eps: added to the variance.

    Returns:
      Whitened values in at least float32, 0 where masked.
    """
    values = jnp.where(weights != 0, at_least_float32(values), 0)
    mean = masked_mean(values, weights)
    white = (values - mean) * jax.lax.rsqrt(masked_var(values, weights) + eps)
    return jnp.where(weights != 0, white if shift_mean else white + mean, 0)
