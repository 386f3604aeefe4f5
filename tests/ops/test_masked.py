"""Masked reductions against Python loops, on degenerate input too."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.masked import masked_mean, masked_sum, masked_var, whiten

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # XLA takes those for 0


@st.composite
def masked(draw):
    n = draw(st.integers(1, 12))
    values = draw(st.lists(floats, min_size=n, max_size=n))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return values, mask


@hypothesis.given(masked())
@hypothesis.settings(max_examples=40, deadline=None)
def test_reductions_equal_loops_whatever_is_masked(case):
    values, mask = case
    kept = [v for v, m in zip(values, mask, strict=True) if m]
    with jax.enable_x64(True):
        x = jnp.array([v if m else np.nan for v, m in zip(values, mask, strict=True)], jnp.float64)
        m = jnp.array(mask)
        mean = sum(kept) / len(kept) if kept else 0.0
        var = sum((v - mean) ** 2 for v in kept) / len(kept) if kept else 0.0
        np.testing.assert_allclose(masked_sum(x, m), sum(kept), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(masked_mean(x, m), mean, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(masked_var(x, m), var, rtol=1e-9, atol=1e-9)
        expected = [(v - mean) / (var + 1e-8) ** 0.5 if k else 0.0 for v, k in zip(values, mask, strict=True)]
        np.testing.assert_allclose(whiten(x, m), expected, rtol=1e-7, atol=1e-7)
        shifted = [e + mean if k else 0.0 for e, k in zip(expected, mask, strict=True)]
        np.testing.assert_allclose(whiten(x, m, shift_mean=False), shifted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("fn", [masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m)[1]])
def test_gradient_is_finite_beside_nan_and_inf(fn):
    x = jnp.array([jnp.nan, 2.0, jnp.inf, 5.0])
    gradient = jax.grad(lambda x: fn(x, jnp.array([False, True, False, True])))(x)
    assert np.isfinite(gradient).all()
    assert gradient[0] == 0 and gradient[2] == 0


def test_all_masked_is_zero_with_zero_gradient():
    x, m = jnp.array([1.0, jnp.nan]), jnp.zeros(2, bool)
    for fn in (masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m).sum()):
        value, gradient = jax.value_and_grad(fn)(x, m)
        assert value == 0
        np.testing.assert_array_equal(gradient, [0, 0])


def test_weights_and_axis():
    x = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
    w = jnp.array([[0.5, 1.5], [2.0, 0.0]])
    np.testing.assert_allclose(masked_sum(x, w, axis=1), [3.5, 6.0])
    np.testing.assert_allclose(masked_mean(x, w, axis=1), [1.75, 3.0])
    np.testing.assert_allclose(masked_mean(x, w), 9.5 / 4)


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_at_least_float32(dtype, out, x64):
    x, m = jnp.ones(4, dtype), jnp.ones(4, bool)
    for y in (masked_sum(x, m), masked_mean(x, m), masked_var(x, m), whiten(x, m)):
        assert y.dtype == out


def test_trap_bfloat16_sums_do_not_stall():
    """1 + 1 + ... stops at 256 in bfloat16."""
    assert masked_sum(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, bool)) == 1000


def test_trap_whitening_ignores_padding_and_is_biased():
    values, mask = jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])
    np.testing.assert_allclose(whiten(values, mask), [-1.0, 1.0, 0.0], rtol=1e-6)
    assert np.isfinite(whiten(jnp.array([5.0]), jnp.array([True]))).all()  # Bessel's correction gives NaN here
