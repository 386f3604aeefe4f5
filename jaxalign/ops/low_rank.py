"""The product with a frozen kernel and a trained low-rank update of it: LoRA, and DoRA's magnitude."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.linear import linear
from jaxalign.ops.precision import at_least_float32, product_precision
from jaxalign.ops.quantised import whole


class LowRank(NamedTuple):
    """An update `a b` of a kernel, its scale in `b`, and the kernel's new column norms where these are trained."""

    a: jax.Array  # [*in, R]
    b: jax.Array  # [R, *out]
    magnitude: jax.Array | None = None  # [*out]


def adapted(x, kernel, update: LowRank, contracted: int):
    """`x (W + A B)`, or `x (W + A B) m / |W + A B|` with a magnitude, the norm that of each output's column.

    The update is never multiplied out: two narrow products beside the kernel's own.  The norm counts as a constant.

    Source: LoRA (arXiv 2106.09685) eq. 3; DoRA (arXiv 2402.09353) eqs. 5 and 11, section 4.3 of the constant norm.

    Args:
      x: [..., *in].
      kernel: W [*in, *out], in the dtype of `x`; or quantised.
      update: in any float dtype; cast to that of `x` for the products.
      contracted: number of dims of `in`.

    Returns:
      [..., *out], of the dtype of `x`.
    """
    narrow = linear(x, update.a.astype(x.dtype), contracted)
    # As wide as the kernel's own product, and cheap: a policy keeps what it is made of.
    y = linear(x, kernel, contracted) + linear(narrow, update.b.astype(x.dtype), 1, kept=False)
    if update.magnitude is None:
        return y
    # Behind a barrier: fused into what reads it, it would be another number in another program, and a reference with
    # the same parameters would have other log-probs.
    norm = column_norms(whole(kernel, x.dtype), update.a, update.b)
    norm = jax.lax.optimization_barrier(jax.lax.stop_gradient(norm))
    return y * (at_least_float32(update.magnitude) / norm).astype(y.dtype)


def column_norms(kernel, a, b):
    """The Euclidean norm of each output's column of `W + A B`, [*out], in at least float32.

        |w + A b|^2 = |w|^2 + 2 (A' w) b + b' (A' A) b

    Args:
      kernel: W [*in, *out].
      a: [*in, R].
      b: [R, *out].
    """
    inputs, rank, out = math.prod(a.shape[:-1]), a.shape[-1], b.shape[1:]
    kernel, a, b = (at_least_float32(x) for x in (kernel.reshape(inputs, -1), a.reshape(inputs, rank), b))
    b = b.reshape(rank, -1)
    precision = product_precision(a.dtype)
    cross = jnp.matmul(a.T, kernel, precision=precision)
    own = jnp.matmul(jnp.matmul(a.T, a, precision=precision), b, precision=precision)
    squares = jnp.sum(kernel * kernel, axis=0) + jnp.sum((2 * cross + own) * b, axis=0)
    return jnp.sqrt(jnp.maximum(squares, 0)).reshape(out)


def merged(kernel, update: LowRank):
    """The kernel that computes what `adapted` does, in the widest of its dtypes and at least float32: [*in, *out].

    Args:
      kernel: W [*in, *out].
      update: of it.
    """
    dtype = jnp.result_type(kernel, update.a, update.b, jnp.float32)
    wide, a, b = (x.astype(dtype) for x in (kernel, update.a, update.b))
    inputs, rank = math.prod(a.shape[:-1]), a.shape[-1]
    product = jnp.matmul(a.reshape(inputs, rank), b.reshape(rank, -1), precision=product_precision(a.dtype))
    whole = wide + product.reshape(kernel.shape)
    if update.magnitude is None:
        return whole
    return whole * (update.magnitude.astype(dtype) / column_norms(wide, a, b))
