"""Precision rules: reductions happen in at least float32, and never below what comes in."""

import jax.numpy as jnp


def at_least_float32(x):
    """`x` in float32, or in float64 where it already is.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
