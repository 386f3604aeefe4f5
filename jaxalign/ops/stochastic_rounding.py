"""Random bits for stochastic rounding: a hash of the number and of a step counter, so that no key is kept."""

import jax
import jax.numpy as jnp


def rounding_bits(x: jax.Array, count: jax.Array) -> jax.Array:
    """32 bits for each number, the same for the same number and count: on any mesh, in any order.

    Args:
      x: float32.
      count: a scalar; another one gives other bits.

    Returns:
      uint32, of x's shape.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _scramble(bits ^ _scramble(jnp.asarray(count).astype(jnp.uint32)))


def _scramble(bits: jax.Array) -> jax.Array:
    """A hash of 32 bits to 32 bits in which every bit in flips half the bits out (MurmurHash3's last steps)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
