"""Matmuls with weights, whose derivative never transposes the larger operand, nor keeps a quantised one."""

from __future__ import annotations

import functools
import math

import jax

from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product_precision
from jaxalign.ops.quantised import Quantised, dequantise


def linear(x, kernel, contracted: int, *, kept: bool = True):
    """Contracts the last `contracted` dims of `x` with the first ones of `kernel`.

    Args:
      x: [..., *in].
      kernel: [*in, *out], of the same dtype; or quantised, which counts as a constant.
      contracted: number of dims of `in`.
      kept: whether a rematerialisation policy that keeps products keeps this one.

    Returns:
      [..., *out], of the dtype of `x`.
    """
    # As a matrix: in the derivative the compiler would copy a kernel of more dims, transposed, before its product.
    lead, out = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    inputs = math.prod(kernel.shape[:contracted])
    rows = x.reshape(*lead, inputs)
    if isinstance(kernel, Quantised):
        y = _quantised(rows, kernel, kept)
    else:
        y = _linear(rows, kernel.reshape(inputs, -1), kept)
    return y.reshape(*lead, *out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, kernel, kept):
    """`x kernel`, [..., I] and [I, O].

    The kernel's gradient sums over all tokens, so one of its operands must be read across its rows, and the compiler
    copies that one.  By itself it is the first operand of the automatic derivative, which is the gradient of the
    output: in an mlp the widest array of the layer, recomputed and transposed element by element, at twice the time
    of the matmuls themselves on a CPU.  Here it is the narrower of the two.
    """
    return _forward(x, kernel, kept)[0]


def _forward(x, kernel, kept):
    # The matmul itself: a rematerialisation policy that saves dots does not look into a call of `_linear`.
    if kept:
        return _product(x, kernel, (x.ndim - 1,), (0,)), (x, kernel)
    # With a batch dim, of size 1, since these policies save products without one.
    dims = (((x.ndim,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(x[None], kernel[None], dims, precision=product_precision(x.dtype))
    return y[0], (x, kernel)


def _backward(kept, saved, d_y):
    x, kernel = saved
    inputs, outputs = kernel.shape
    tokens = tuple(range(x.ndim - 1))
    d_x = _product(d_y, kernel, (x.ndim - 1,), (1,))
    if inputs <= outputs:
        return d_x, _product(x, d_y, tokens, tokens)
    transposed = _product(d_y, x, tokens, tokens)
    if platform() == "cpu":
        # Or the compiler would make one matmul of this and the transpose, with the wider operand first again.
        transposed = jax.lax.optimization_barrier(transposed)
    return d_x, transposed.T


_linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantised(x, kernel, kept):
    """`x kernel`, [..., I] and [I, O] quantised, which is made for the product and again for its derivative.

    Behind barriers: kernels of all layers could be made at once, or kept from one product to the other.
    """
    return _quantised_forward(x, kernel, kept)[0]


def _quantised_forward(x, kernel, kept):
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return _forward(x, dequantise(kernel, x.dtype).reshape(x.shape[-1], -1), kept)[0], kernel


def _quantised_backward(kept, kernel, d_y):
    d_y, kernel = jax.lax.optimization_barrier((d_y, kernel))
    made = dequantise(kernel, d_y.dtype).reshape(-1, d_y.shape[-1])
    return _product(d_y, made, (d_y.ndim - 1,), (1,)), None


_quantised.defvjp(_quantised_forward, _quantised_backward)


def _product(a, b, of_a, of_b):
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), precision=product_precision(a.dtype))
