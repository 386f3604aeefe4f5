"""Activations, gated and plain, with a derivative that keeps nothing but its inputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32


@jax.custom_vjp
def swiglu(gate, up):
    """`silu(gate) * up` (arXiv 2002.05202, eq. 6)."""
    return jax.nn.silu(gate) * up


def _forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _backward(saved, d_y):
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    silu = gate * s
    return d_y * up * (s + silu * (1 - s)), d_y * silu


swiglu.defvjp(_forward, _backward)


@jax.custom_vjp
def geglu(gate, up):
    """`gelu(gate) * up`, the GELU by tanh (arXiv 1606.08415, section 2), in at least float32, rounded once."""
    return (_gelu(at_least_float32(gate)) * at_least_float32(up)).astype(gate.dtype)


def _gelu(x):
    return jax.nn.gelu(x, approximate=True)


def _geglu_forward(gate, up):
    return geglu(gate, up), (gate, up)


def _geglu_backward(saved, d_y):
    gate, up = saved
    wide, d_y = at_least_float32(gate), at_least_float32(d_y)
    gelu, slope = jax.jvp(_gelu, (wide,), (jnp.ones_like(wide),))
    return (d_y * at_least_float32(up) * slope).astype(gate.dtype), (d_y * gelu).astype(up.dtype)


geglu.defvjp(_geglu_forward, _geglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x, approximate: bool):
    """GELU (arXiv 1606.08415, section 2), exact or by tanh, in at least float32, rounded once."""
    return jax.nn.gelu(at_least_float32(x), approximate=approximate).astype(x.dtype)


def _gelu_forward(x, approximate):
    return gelu(x, approximate), x


def _gelu_backward(approximate, x, d_y):
    wide = at_least_float32(x)
    slope = jax.jvp(functools.partial(jax.nn.gelu, approximate=approximate), (wide,), (jnp.ones_like(wide),))[1]
    return ((at_least_float32(d_y) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
