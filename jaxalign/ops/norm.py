"""Root-mean-square and layer normalisation, each with a derivative that keeps nothing but its input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, eps: float):
    """`x / sqrt(mean(x^2) + eps) * scale` along the last dim, in at least float32 (arXiv 1910.07467, eq. 4)."""
    wide = at_least_float32(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(wide.dtype)).astype(x.dtype)


def _forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _backward(eps, saved, d_y):
    x, scale = saved
    wide, d_y = at_least_float32(x), at_least_float32(d_y)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    d_unit = d_y * scale.astype(wide.dtype)
    along = jnp.mean(d_unit * wide, axis=-1, keepdims=True)
    d_x = inverse * d_unit - wide * (inverse**3 * along)
    d_scale = jnp.sum(d_y * wide * inverse, axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps: float):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` along the last dim, in at least float32.

    Source: layer normalisation (arXiv 1607.06450).
    """
    unit, _ = _unit(x, eps)
    return (unit * scale.astype(unit.dtype) + bias.astype(unit.dtype)).astype(x.dtype)


def _unit(x, eps):
    """The normalised x, and what its distance from the mean was multiplied by."""
    wide = at_least_float32(x)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * inverse, inverse


def _layer_forward(x, scale, bias, eps):
    return layer_norm(x, scale, bias, eps), (x, scale, bias)


def _layer_backward(eps, saved, d_y):
    x, scale, bias = saved
    unit, inverse = _unit(x, eps)
    d_y, tokens = at_least_float32(d_y), tuple(range(x.ndim - 1))
    d_unit = d_y * scale.astype(unit.dtype)
    along = jnp.mean(d_unit * unit, axis=-1, keepdims=True)
    d_x = inverse * (d_unit - jnp.mean(d_unit, axis=-1, keepdims=True) - unit * along)
    d_scale, d_bias = jnp.sum(d_y * unit, axis=tokens), jnp.sum(d_y, axis=tokens)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)
