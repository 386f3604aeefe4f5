"""The layers' operations and their own derivatives against plain formulas under automatic differentiation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.activation import gelu, swiglu
from jaxalign.ops.linear import linear
from jaxalign.ops.norm import layer_norm, rms_norm


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(ours, plain, *args, tolerance=1e-12):
    """Values, and gradients by all arguments of a random combination of the outputs."""
    np.testing.assert_allclose(ours(*args), plain(*args), rtol=tolerance, atol=tolerance)
    d = normal(99, *plain(*args).shape)
    numbers = tuple(range(len(args)))
    a, b = (jax.grad(lambda *x, f=f: jnp.sum(f(*x) * d), numbers)(*args) for f in (ours, plain))
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "equation, x, kernel, contracted",
    [
        ("btd,df->btf", (2, 3, 4), (4, 7), 1),  # wider out: the input is turned
        ("btf,fd->btd", (2, 3, 7), (7, 4), 1),  # wider in: the output's gradient is turned
        ("btd,dnh->btnh", (2, 3, 6), (6, 2, 5), 1),
        ("btnh,nhd->btd", (2, 3, 4, 5), (4, 5, 6), 2),
        ("btnh,nhd->btd", (2, 3, 2, 2), (2, 2, 9), 2),
        ("bd,dv->bv", (3, 4), (4, 5), 1),
    ],
)
def test_linear(x64, equation, x, kernel, contracted):
    assert_same(
        lambda a, b: linear(a, b, contracted),
        lambda a, b: jnp.einsum(equation, a, b),
        normal(0, *x),
        normal(1, *kernel),
    )


@pytest.mark.parametrize("inputs, outputs", [(48, 16), (16, 48), (16, 16)])
def test_products_of_the_derivative_read_their_first_operand_along_its_rows(inputs, outputs):
    """In the compiled program: a CPU takes half as long again for one that reads across them."""
    x, kernel, d = (
        normal(i, *n, dtype=jnp.float32) for i, n in enumerate(((8, 64, inputs), (inputs, outputs), (8, 64, outputs)))
    )

    def derivative(x, kernel, d):
        return jax.vjp(lambda x, k: linear(jnp.tanh(x), k, 1), x, kernel)[1](jnp.sin(d))

    program = jax.jit(derivative).lower(x, kernel, d).compile().as_text()
    contracted = re.findall(r" dot\(.*lhs_contracting_dims=\{([\d,]*)\}", program)
    assert contracted == ["1", "1"]


def test_linear_turns_the_narrower_operand():
    """The gradient of a wide kernel reads the output's gradient as it lies."""

    def kernel_gradient(x, kernel, d):
        return jax.vjp(lambda k: linear(x, k, 1), kernel)[1](d)[0]

    wide = jax.make_jaxpr(kernel_gradient)(jnp.zeros((2, 3, 4)), jnp.zeros((4, 9)), jnp.zeros((2, 3, 9)))
    assert "transpose" not in str(wide)
    narrow = jax.make_jaxpr(kernel_gradient)(jnp.zeros((2, 3, 9)), jnp.zeros((9, 4)), jnp.zeros((2, 3, 4)))
    assert "transpose" in str(narrow)


def test_layer_norm(x64):
    def plain(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias

    args = 3 + normal(0, 2, 5, 8), normal(1, 8), normal(2, 8)
    assert_same(lambda *given: layer_norm(*given, 1e-3), plain, *args)


def test_layer_norm_of_narrow_numbers_is_made_in_float32():
    x = 100 + normal(0, 4, 64, dtype=jnp.bfloat16)
    one, none = jnp.ones(64, jnp.bfloat16), jnp.zeros(64, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(np.float64(layer_norm(x, one, none, 1e-12)), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(x64, approximate):
    def plain(x):
        inner = jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)) if approximate else jax.lax.erf(x / 2**0.5)
        return x * (1 + inner) / 2

    assert_same(lambda x: gelu(x, approximate), plain, 3 * normal(0, 4, 9))


def test_rms_norm(x64):
    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    assert_same(lambda x, s: rms_norm(x, s, 1e-5), plain, normal(0, 2, 3, 8), normal(1, 8))
    assert_same(lambda x, s: rms_norm(x, s, 1e-5), plain, jnp.zeros((1, 2, 8)), normal(1, 8))


def test_rms_norm_works_in_float32():
    x, scale = normal(0, 4, 64, dtype=jnp.bfloat16), normal(1, 64, dtype=jnp.float32)
    wide = x.astype(jnp.float32)
    expected = wide / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5) * scale
    found = rms_norm(x, scale, 1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    d_x, d_scale = jax.grad(lambda x, s: jnp.sum(rms_norm(x, s, 1e-5).astype(jnp.float32)), (0, 1))(x, scale)
    assert d_x.dtype == jnp.bfloat16 and d_scale.dtype == jnp.float32


def test_swiglu(x64):
    gate = normal(0, 2, 3, 8) * 20  # far into both tails
    assert_same(swiglu, lambda g, u: g / (1 + jnp.exp(-g)) * u, gate, normal(1, 2, 3, 8))


def test_swiglu_of_huge_numbers_is_finite():
    gate = jnp.array([-1e30, -1e4, 0.0, 1e4, 1e30])
    value, d_gate = jax.value_and_grad(lambda g: jnp.sum(swiglu(g, jnp.ones(5))))(gate)
    assert np.isfinite(value)
    np.testing.assert_allclose(d_gate, [0, 0, 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm(x, jnp.ones(8), 1e-5),
        lambda x: layer_norm(x, jnp.ones(8), jnp.ones(8), 1e-5),
        lambda x: swiglu(x, x),
        lambda x: gelu(x, False),
    ],
)
def test_derivatives_keep_their_inputs_alone(call):
    """Nothing of the size of the input is kept beside it: what a layer keeps is the memory of training."""
    x = jnp.ones((64, 8))
    kept = jax.tree.leaves(jax.vjp(call, x)[1])
    assert sum(leaf.size for leaf in kept if leaf.size >= x.size) <= 2 * x.size
