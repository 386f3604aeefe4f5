"""The reward model's loss: hand numbers, a Python loop, degenerate input."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.losses_reward import reward_loss

N = 5


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


@functools.partial(jax.jit, static_argnames="options")
def evaluate(chosen, rejected, mask, margin, options=()):
    def scalar(scores):
        terms = reward_loss(*scores, mask, margin=margin, **dict(options))
        return jnp.sum(terms.loss * terms.weight), terms

    return jax.grad(scalar, has_aux=True)((chosen, rejected))


# Without numbers below the normal ones, which XLA takes for 0.
scores = st.lists(st.floats(-30, 30, allow_subnormal=False), min_size=N, max_size=N)


@pytest.mark.parametrize("options", [(), (("center_coef", 0.03), ("label_smoothing", 0.2))], ids=["plain", "all"])
@hypothesis.given(scores, scores, scores, st.lists(st.booleans(), min_size=N, max_size=N))
@hypothesis.settings(max_examples=15, deadline=None)
def test_equals_a_loop(options, chosen, rejected, margin, mask):
    coef, eps = dict(options).get("center_coef", 0), dict(options).get("label_smoothing", 0)
    with jax.enable_x64(True):
        hide = lambda x: jnp.where(jnp.array(mask), jnp.array(x, jnp.float64), jnp.nan)  # noqa: E731
        (d_chosen, d_rejected), terms = evaluate(hide(chosen), hide(rejected), jnp.array(mask), hide(margin), options)
        for i, (c, r, m, keep) in enumerate(zip(chosen, rejected, margin, mask, strict=True)):
            d = c - r - m
            loss = (1 - eps) * softplus(-d) + eps * softplus(d) + coef * (c + r) ** 2
            slope = -(1 - eps) * logistic(-d) + eps * logistic(d)
            expected = (loss, slope + 2 * coef * (c + r), -slope + 2 * coef * (c + r)) if keep else (0, 0, 0)
            np.testing.assert_allclose((terms.loss[i], d_chosen[i], d_rejected[i]), expected, rtol=1e-12, atol=1e-13)
        kept = [(c, r) for c, r, k in zip(chosen, rejected, mask, strict=True) if k]
        for name, value in {
            "rewards/chosen": lambda c, r: c,
            "rewards/rejected": lambda c, r: r,
            "rewards/margins": lambda c, r: c - r,
            "rewards/accuracies": lambda c, r: float(c > r),
            "rewards/ties": lambda c, r: float(c == r),
        }.items():
            total, weight = terms.metrics[name]
            assert weight == len(kept)
            np.testing.assert_allclose(total, sum(value(c, r) for c, r in kept), rtol=1e-12, atol=1e-12)


def test_by_hand():
    _, terms = evaluate(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]), jnp.ones(2, bool), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(terms.loss, [math.log(2)] * 2, rtol=1e-6)  # a margin of 1 makes a lead of 1 a tie
    assert terms.metrics["rewards/accuracies"][0] == 1  # a tie is no success; the margin plays no part
    assert terms.metrics["rewards/ties"][0] == 1  # but no failure either


def test_trap_centring_pulls_at_the_constant():
    """Without it the loss does not see a constant added to all scores."""
    chosen, rejected, mask = jnp.array([3.0]), jnp.array([2.0]), jnp.ones(1, bool)
    plain, _ = evaluate(chosen, rejected, mask, None)
    assert plain[0] + plain[1] == 0
    centred, _ = evaluate(chosen, rejected, mask, None, (("center_coef", 0.01),))
    np.testing.assert_allclose(centred[0] + centred[1], 4 * 0.01 * 5, rtol=1e-5)


def test_degenerate_batches():
    nan = jnp.full(3, jnp.nan)
    gradients, terms = evaluate(nan, nan, jnp.zeros(3, bool), nan)
    assert terms.loss.sum() == terms.weight.sum() == 0
    assert all((g == 0).all() for g in gradients)
    _, terms = evaluate(jnp.array([-1e30]), jnp.array([1e30]), jnp.ones(1, bool), None)
    np.testing.assert_allclose(terms.loss, [2e30], rtol=1e-6)


def test_16_bit_scores_become_float32():
    terms = reward_loss(jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16), jnp.ones(1, bool))
    assert terms.loss.dtype == jnp.float32
