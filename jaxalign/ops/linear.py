"""Products with weights, with a derivative that never turns the larger operand around."""

from __future__ import annotations

import functools

import jax

from jaxalign.ops.platform import platform
from jaxalign.ops.precision import product_precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x, kernel, contracted: int):
    """Contracts the last `contracted` dims of `x` with the first ones of `kernel`.

    The kernel's gradient sums over all tokens, so one of its operands must be read across its rows, and the compiler
    copies that one.  By itself it is the first operand of the automatic derivative, which is the gradient of the
    output: in an mlp the widest array of the layer, recomputed and turned around element by element, at twice the time
    of the products themselves on a CPU.  Here it is the narrower of the two.

    Args:
      x: [..., *in].
      kernel: [*in, *out], of the same dtype.
      contracted: number of dims of `in`.

    Returns:
      [..., *out], of the dtype of `x`.
    """
    return _forward(x, kernel, contracted)[0]


def _forward(x, kernel, contracted):
    # The product itself: a rematerialisation policy that keeps products does not look into a call of `linear`.
    return _product(x, kernel, range(x.ndim - contracted, x.ndim), range(contracted)), (x, kernel)


def _backward(contracted, saved, d_y):
    x, kernel = saved
    lead, out = x.ndim - contracted, kernel.ndim - contracted
    d_x = _product(d_y, kernel, range(lead, d_y.ndim), range(contracted, kernel.ndim))
    tokens = range(lead)
    if kernel.size // _size(kernel.shape[contracted:]) <= _size(kernel.shape[contracted:]):
        return d_x, _product(x, d_y, tokens, tokens)
    turned = _product(d_y, x, tokens, tokens)  # [*out, *in]
    if platform() == "cpu":
        # Or the compiler would make one product of this and the transpose, with the wider operand first again.
        turned = jax.lax.optimization_barrier(turned)
    return d_x, turned.transpose(*range(out, kernel.ndim), *range(out))


linear.defvjp(_forward, _backward)


def _size(shape) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _product(a, b, of_a, of_b):
    return jax.lax.dot_general(a, b, ((tuple(of_a), tuple(of_b)), ((), ())), precision=product_precision(a.dtype))
