"""Checksums of arrays: every bit counts, and they are the same however an array is split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def checksum(x: Array) -> Array:
    """Two sums over an array's bits, modulo 2^32, in which every place has a weight of its own, and what is not finite.

    A single changed bit always changes the first sum; anything else goes unnoticed once in 2^64.  One pass over the
    array, on its device; sums of integers do not depend on the order in which devices add.

    Args:
      x: of any shape, of numbers or truth values.

    Returns:
      uint32 [3]: the two sums, and how many numbers are not finite.

    >>> [int(v) for v in checksum(jnp.array([1.0, jnp.nan]))][2]
    1
    """
    bits = _bits(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    first = jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    second = jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    wrong = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) if floating else jnp.uint32(0)
    return jnp.stack([first, second, wrong])


def _bits(x: Array) -> Array:
    """uint32; numbers of eight bytes are two words, in one more dim."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]).astype(jnp.uint32)
