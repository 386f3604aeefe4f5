"""An optimizer's moments in 8 bits: blocks of a row share a scale, small numbers keep their digits.

Block-wise 8-bit moments are those of Dettmers et al. (arXiv 2110.02861): a scale for each block of neighbours, so that
one large number spoils few others, and codes that lie close together near zero.  A plain linear code would not do: a
second moment under 1/510 of its block's largest would become 0, and `m / (sqrt(v) + eps)` a number of any size.

Here a code is a float of 8 bits.  A first moment takes a sign and 3 bits of mantissa, a second moment, which has no
sign, 4 bits; the other bits count powers of two downward from the block's largest number, and 0 is exact.  Either
reaches from there through 16 powers of two (4.8 decades; the paper's own codes through 7, and coarser at their end).
Both ways are shifts of float32's own bits: no tables, no division, the same codes on any platform.  What is kept for a
block is the largest number's exponent and mantissa, exactly: a scale that was itself rounded upward a little in every
step would grow faster than b2 = 0.999 lets a second moment fall.

- Rounding is stochastic and unbiased (see `optimizer.kept_in`), with neighbours 6 to 12 % (first moment) or 3 to 6 %
  (second) apart.
- A second moment below its block's reach is kept at the reach's end, never at 0: the step of such a weight is smaller
  than float32's, never larger.  A first moment below it becomes 0 or the end, stochastically.
- A block that holds a number that is not finite comes back as NaN, all of it.

Blocks lie along the last dim, inside a row.  Scales have the parameter's dims, its last one divided by the block, so
that one sharding rule serves parameter, codes and scales; where the last dim is split into multiples of the block,
nothing moves between devices.  Norm scales, biases, rows shorter than 8 and adafactor's factored vectors are few bytes
and stay float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.stochastic_rounding import rounding_bits
from jaxalign.parallel.host_memory import DEVICE, in_memory
from jaxalign.parallel.sharding import path_name

BLOCK = 32  # numbers that share a scale: 2 bytes for 32; divides the parts of a vocabulary of 128,256 on 8 devices
_SHORTEST = 8  # rows shorter than this stay float32


class Packed(NamedTuple):
    """An optimizer's state with its moments in 8 bits."""

    moments: Any  # the state's tree, int8 or uint8 codes in place of moments
    scales: Any  # the same tree: int16 [..., blocks] where there are codes, None elsewhere


class _Code(NamedTuple):
    """A float of 8 bits."""

    signed: bool
    mantissa: int  # bits

    @property
    def dtype(self):
        return jnp.int8 if self.signed else jnp.uint8

    @property
    def most(self) -> int:
        """The code of a block's largest number."""
        return 127 if self.signed else 255

    @property
    def dropped(self) -> int:
        """Bits of float32's mantissa that are not kept."""
        return 23 - self.mantissa

    @property
    def infinite(self) -> int:
        """What infinity's kept bits are."""
        return 255 << self.mantissa


# What optax calls its moments.
_CODES = {"mu": _Code(True, 3), "trace": _Code(True, 3), "nu": _Code(False, 4), "v": _Code(False, 4)}


def pack(state: Any, count: Any) -> Packed:
    """An optimizer's state with its moments in 8 bits.

    Args:
      state: of optax transformations over parameters.
      count: of the updates made, for stochastic rounding.

    >>> import optax
    >>> packed = pack(optax.scale_by_adam().init({"kernel": jnp.ones((4, 64))}), 0)
    >>> packed.moments.nu["kernel"].dtype, packed.scales.nu["kernel"].shape
    (dtype('uint8'), (4, 2))
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    moments, scales = [], []
    for path, x in paths:
        code, scale = _code(path, x), None
        if code:
            x, scale = _quantise(x, code, count)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        moments.append(x)
        scales.append(scale)
    return Packed(jax.tree.unflatten(tree, moments), jax.tree.unflatten(tree, scales))


def unpack(packed: Packed) -> Any:
    """The state that was packed, its moments in float32."""

    def one(path, x, scale):
        code = None if scale is None else _code(path, x)
        return _dequantise(x, scale, code) if code else x

    return jax.tree_util.tree_map_with_path(one, packed.moments, packed.scales)


def count_not_finite(tree: Any) -> dict[str, jax.Array]:
    """How many blocks of 8-bit moments hold a number that is not finite: codes are integers, and do not show it.

    Args:
      tree: a training state, or any part of it.

    Returns:
      uint32 by the path of the moment's codes in the tree; empty where nothing is kept in 8 bits.
    """
    found = {}
    for path, packed in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Packed))[0]:
        if isinstance(packed, Packed):
            for inner, scale in jax.tree_util.tree_flatten_with_path(packed.scales)[0]:
                name = path_name((*path, jax.tree_util.GetAttrKey("moments"), *inner))
                found[name] = _count(in_memory(scale, DEVICE), _moment(inner).infinite)
    return found


@jax.jit
def _count(scale: jax.Array, infinite: int) -> jax.Array:
    return jnp.sum(scale >= infinite, dtype=jnp.uint32)


def _code(path: tuple, x: Any) -> _Code | None:
    """How a leaf of an optimizer's state is kept; None: as it is."""
    if not x.ndim or x.shape[-1] < _SHORTEST or getattr(path[-1], "key", None) in ("scale", "bias"):
        return None
    return _moment(path)


def _moment(path: tuple) -> _Code | None:
    return next((_CODES[name] for name in (getattr(k, "name", None) for k in path) if name in _CODES), None)


def _quantise(x: jax.Array, code: _Code, count: Any) -> tuple[jax.Array, jax.Array]:
    """Codes of x's shape, and for each block the kept bits of its largest number."""
    exact = at_least_float32(x).astype(jnp.float32)
    size, noise = jnp.abs(exact), rounding_bits(exact, count)
    # Noise below the kept bits carries into them as often as what is dropped is large.
    bits = jax.lax.bitcast_convert_type(size, jnp.uint32) + (noise >> (32 - code.dropped))
    kept = (bits >> code.dropped).astype(jnp.int32)
    kept = jnp.where(jnp.isfinite(exact), jnp.minimum(kept, code.infinite - 1), code.infinite)
    scale = jnp.max(_blocks(kept), axis=-1)
    below = _below(scale, code, x.shape[-1])
    smallest = jax.lax.bitcast_convert_type((below + 1) << code.dropped, jnp.float32)
    # 24 bits, so that the number is below 1 in float32.
    by_bits = (noise >> 8).astype(jnp.float32) * 2.0**-24 * smallest < size if code.signed else size > 0
    found = jnp.where(size < smallest, by_bits.astype(jnp.int32), kept - below)
    found = jnp.where(exact < 0, -found, found)
    return found.astype(code.dtype), scale.astype(jnp.int16)


def _dequantise(codes: jax.Array, scale: jax.Array, code: _Code) -> jax.Array:
    """The numbers that codes stand for, in float32."""
    signed, scale = codes.astype(jnp.int32), scale.astype(jnp.int32)
    kept = jnp.abs(signed) + _below(scale, code, codes.shape[-1])
    size = jax.lax.bitcast_convert_type(kept << code.dropped, jnp.float32)
    found = jnp.where(signed == 0, 0.0, jnp.where(signed < 0, -size, size))
    return jnp.where(_spread(scale, codes.shape[-1]) >= code.infinite, jnp.nan, found)


def _below(scale: jax.Array, code: _Code, length: int) -> jax.Array:
    """For each number what its block takes off the kept bits to make a code of them."""
    return _spread(jnp.maximum(scale - code.most, 0), length)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., n] as [..., blocks, block], the last block filled up with zeros."""
    block = min(BLOCK, x.shape[-1])
    if short := -x.shape[-1] % block:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, block)


def _spread(x: jax.Array, length: int) -> jax.Array:
    """What blocks have, [..., blocks], for each of their numbers, [..., length]."""
    wide = jnp.broadcast_to(x[..., None], (*x.shape, min(BLOCK, length)))
    return wide.reshape(*x.shape[:-1], -1)[..., :length]
