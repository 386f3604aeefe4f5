"""Kernels in 8 or 4 bits: blocks of 64 numbers share a scale; NF4's scales take 8 bits in groups of 256.

    parts = quantise(kernel, "nf4", dim)                        # a layer's kernel, on the host or traced
    y = linear(x, Quantised(parts, dim, kernel.shape[dim]), 1)  # never kept, made again for the gradient

NF4 is the data type of QLoRA (arXiv 2305.14314 section 3 and appendix E): 16 levels between -1 and 1, 0 among them,
between quantiles of a normal distribution.  Scales of blocks are numbers near each other, so that they take 8 bits: of
256 neighbouring blocks the least scale and the step between codes are kept in float32.  QLoRA subtracts the mean of
all scales and keeps the largest deviation of 256; from the least to the largest of a group is a narrower range, and
neither depends on the order in which a sum is made.

Blocks run along one dim of a kernel; the last block of a dim that 64 does not divide is shorter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxalign.ops.platform import platform

BLOCK = 64  # numbers that share a scale
GROUP = 256  # blocks that share the range of their scales
PARTS = {"int8": ("codes", "scales"), "nf4": ("codes", "scales", "ranges")}

# QLoRA, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BETWEEN = tuple((np.float32(a) + np.float32(b)) / np.float32(2) for a, b in itertools.pairwise(NF4))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["dim", "length", "gathered"])
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A layer's kernel in few bits."""

    parts: dict[str, jax.Array]  # of `quantise`
    dim: int  # along which blocks lie
    length: int  # of that dim
    # How codes lie on the ambient mesh while the kernel is made of them: a quarter of the kernel's bytes move.
    gathered: PartitionSpec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        codes = self.parts["codes"].shape
        return (*codes[: self.dim], self.length, *codes[self.dim + 1 :])


def quantise(kernel: Any, kind: str, dim: int) -> dict[str, Any]:
    """A layer's kernel in few bits.

    NumPy, which quantises what is read from files, divides exactly; compilers multiply by the reciprocal of 127 or 255.
    So scales of int8 and steps of NF4's ranges may differ from NumPy's in their last bit, and the code of a number
    half-way between two may be the other one.

    Args:
      kernel: of any shape and float dtype.
      kind: a key of `PARTS`.
      dim: along which blocks lie.

    Returns:
      "int8": codes int8 of the kernel's shape, scales float32, one a block: a number is code times scale.
      "nf4": codes uint8, two of neighbours in a byte, the first in the lower bits; scales uint8; ranges float32 [2, G],
        of each group of 256 scales in the order of their array the least, and the step from code to code.

    >>> quantise(np.array([0.5, -1.27]), "int8", 0)["codes"]
    array([  50, -127], dtype=int8)
    """
    xp = jnp if isinstance(kernel, jax.Array) else np
    dim %= kernel.ndim
    length = kernel.shape[dim]
    x = _blocks(xp.asarray(kernel, np.float32), dim, xp)
    largest = abs(x).max(axis=dim + 1)
    if kind == "int8":
        scales = largest / np.float32(127)
        codes = xp.rint(x / _divisor(scales, dim, xp)).clip(-127, 127).astype(np.int8)
        return {"codes": _rows(codes, dim, length), "scales": scales}
    parts = _in_8_bits(largest, xp)
    x = x / _divisor(_scales(parts, xp), dim, xp)
    codes = xp.zeros(x.shape, np.uint8)
    for edge in _BETWEEN:
        codes += x > edge
    codes = _rows(codes, dim, length + length % 2)
    low, high = (codes[(*[slice(None)] * dim, slice(first, None, 2))] for first in (0, 1))
    return {"codes": low | (high << np.uint8(4))} | parts


def dequantise(kernel: Quantised, dtype: Any) -> jax.Array:
    """The kernel itself.

    Args:
      kernel: in few bits.
      dtype: of the result; its numbers are made in float32.
    """
    parts, dim, length = _gathered(kernel), kernel.dim, kernel.length
    codes = parts["codes"]
    if codes.dtype == jnp.int8:
        numbers, scales = codes.astype(jnp.float32), parts["scales"]
    else:
        shifts = jnp.array([0, 4], jnp.uint8).reshape(2, *(1,) * (codes.ndim - dim - 1))
        codes = _rows((jnp.expand_dims(codes, dim + 1) >> shifts) & jnp.uint8(15), dim, length)
        # Behind a barrier: a multiplication and an addition that a compiler may round once or twice.
        numbers, scales = _level(codes), jax.lax.optimization_barrier(_scales(parts, jnp))
    return (numbers * _rows(_spread(scales, dim, jnp), dim, length)).astype(dtype)


def whole(kernel: jax.Array | Quantised, dtype: Any) -> jax.Array:
    """A kernel of either kind as an array of a dtype."""
    return dequantise(kernel, dtype) if isinstance(kernel, Quantised) else kernel.astype(dtype)


def _gathered(kernel: Quantised) -> dict[str, jax.Array]:
    if kernel.gathered is None:
        return kernel.parts
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=kernel.gathered)
    return {name: x if name == "ranges" else place(x) for name, x in kernel.parts.items()}


def _level(codes: jax.Array) -> jax.Array:
    """NF4's level of each code.

    Chosen bit by bit, since accelerators compute faster than they look numbers up one by one; a CPU takes five times as
    long for it as for the table.
    """
    if platform() == "cpu":
        return jnp.array(NF4, jnp.float32).at[codes.astype(jnp.int32)].get(mode="clip")
    levels: list[Any] = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        is_set = (codes >> jnp.uint8(bit)) & jnp.uint8(1) != 0
        levels = [jnp.where(is_set, b, a) for a, b in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _in_8_bits(largest: Any, xp: Any) -> dict[str, Any]:
    """Scales of blocks as codes between the least and the largest of a group."""
    flat = largest.reshape(-1)
    groups = xp.pad(flat, (0, -flat.size % GROUP), mode="edge").reshape(-1, GROUP)
    least = groups.min(axis=1)
    step = (groups.max(axis=1) - least) / np.float32(255)
    codes = xp.rint((groups - least[:, None]) / xp.where(step > 0, step, 1)[:, None]).astype(np.uint8)
    return {"scales": codes.reshape(-1)[: flat.size].reshape(largest.shape), "ranges": xp.stack([least, step])}


def _scales(parts: dict[str, Any], xp: Any) -> Any:
    """NF4's scales, of the dims of their codes."""
    codes = parts["scales"]
    least, step = (xp.repeat(x, GROUP)[: codes.size].reshape(codes.shape) for x in parts["ranges"])
    return least + codes.astype(np.float32) * step


def _divisor(scales: Any, dim: int, xp: Any) -> Any:
    """Scales as what blocks are divided by; a block of zeros by 1."""
    return xp.expand_dims(xp.where(scales > 0, scales, np.float32(1)), dim + 1)


def _blocks(x: Any, dim: int, xp: Any) -> Any:
    """[..., n, ...] as [..., blocks, 64, ...], the last block filled up with zeros."""
    if short := -x.shape[dim] % BLOCK:
        x = xp.pad(x, [(0, short if d == dim else 0) for d in range(x.ndim)])
    return x.reshape(*x.shape[:dim], -1, BLOCK, *x.shape[dim + 1 :])


def _spread(scales: Any, dim: int, xp: Any) -> Any:
    """What blocks have for each of their numbers, [..., blocks, 64, ...]."""
    wide = xp.expand_dims(scales, dim + 1)
    return xp.broadcast_to(wide, (*scales.shape[: dim + 1], BLOCK, *scales.shape[dim + 1 :]))


def _rows(x: Any, dim: int, length: int) -> Any:
    """[..., blocks, some, ...] as [..., n, ...], cut to a length."""
    flat = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
    return flat[(*[slice(None)] * dim, slice(0, length))]
