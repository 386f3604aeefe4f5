"""KL estimators, advantages and PPO's losses against hand numbers, Python loops and numpy, in float64 to 1e-12."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.ops.advantages import gae
from jaxalign.ops.kl import ESTIMATORS, adapt_kl_coef, kl_estimate, last_real, token_rewards
from jaxalign.ops.losses_policy import policy_loss, value_loss
from jaxalign.ops.masked import whiten


def ragged(rng, rows=5, width=7):
    """A mask of completions of different lengths, one of them empty, one full."""
    lengths = np.r_[0, width, rng.integers(1, width, rows - 2)]
    return np.arange(width) < lengths[:, None]


def gae_loop(rewards, values, mask, gamma, lam):
    """The textbook recursion, row by row, over the real tokens alone."""
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for b in range(len(rewards)):
        real = [t for t in range(rewards.shape[1]) if mask[b, t]]
        running, next_value = 0.0, 0.0
        for t in reversed(real):
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            running = delta + gamma * lam * running
            advantages[b, t], returns[b, t] = running, running + values[b, t]
            next_value = values[b, t]
    return advantages, returns


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_the_loop(x64, gamma, lam):
    rng = np.random.default_rng(0)
    mask = ragged(rng)
    rewards, values = rng.normal(size=(2, *mask.shape))
    got = gae(rewards, mask, values=values, gamma=gamma, gae_lambda=lam)
    for one, other in zip(got, gae_loop(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_gae_hand_numbers(x64):
    # V = (1, 2), r = (0, 3), gamma 1/2, lambda 1/2: delta_1 = 3 - 2 = 1, delta_0 = 0 + 1 - 1 = 0, A_0 = 0 + 1/4
    rewards, values = np.array([[0.0, 3.0]]), np.array([[1.0, 2.0]])
    got, returns = gae(rewards, np.ones((1, 2), bool), values=values, gamma=0.5, gae_lambda=0.5)
    assert got.tolist() == [[0.25, 1.0]] and returns.tolist() == [[1.25, 3.0]]


def test_gae_steps_over_masked_places(x64):
    mask = np.array([[True, False, True, True, False]])
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 1, 5))
    got = gae(rewards, mask, values=values, gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(got[0], gae_loop(rewards, values, mask, 0.9, 0.8)[0], atol=1e-12)


def test_trap_gae_over_padding(x64):
    """Whatever padding holds, NaN included, never enters; nor does the amount of padding."""
    rng = np.random.default_rng(2)
    mask = ragged(rng)
    rewards, values = rng.normal(size=(2, *mask.shape))
    options = {"gamma": 1.0, "gae_lambda": 0.95}
    clean = gae(rewards, mask, values=values, **options)
    poisoned = gae(np.where(mask, rewards, np.nan), mask, values=np.where(mask, values, 1e30), **options)
    wide = [np.pad(x, ((0, 0), (0, 4))) for x in (rewards, mask, values)]
    padded = gae(*wide[:2], values=wide[2], **options)
    for a, b, c in zip(clean, poisoned, padded, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c[:, :-4], atol=1e-9)


def test_gae_without_a_critic_is_refused():
    ones = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="value model"):
        gae(ones, ones > 0, gamma=1.0, gae_lambda=0.95)


def test_gae_gives_no_gradient():
    ones = jnp.ones((1, 3))
    gradient = jax.grad(lambda v: gae(ones, ones > 0, values=v, gamma=1.0, gae_lambda=0.95)[1].sum())(ones)
    assert not gradient.any()


def test_kl_estimators_by_hand(x64):
    policy, reference = np.log([0.5, 0.1]), np.log([0.25, 0.4])
    for name, by_hand in {
        "k1": [math.log(2), math.log(0.25)],
        "k2": [math.log(2) ** 2 / 2, math.log(0.25) ** 2 / 2],
        "k3": [0.5 - 1 + math.log(2), 4 - 1 + math.log(0.25)],
    }.items():
        np.testing.assert_allclose(kl_estimate(policy, reference, name), by_hand, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(policy, reference, "k4")


def test_trap_kl_sign_and_estimator(x64):
    """In expectation under the policy k1 and k3 are the KL, k2 nearly; the KL is positive; k1 alone goes negative."""
    rng = np.random.default_rng(3)
    p, q = (rng.dirichlet(np.ones(20) * 30) for _ in range(2))
    exact = float(np.sum(p * np.log(p / q)))
    mean = {name: float(np.sum(p * np.asarray(kl_estimate(np.log(p), np.log(q), name)))) for name in ESTIMATORS}
    assert exact > 0
    assert mean["k1"] == pytest.approx(exact, rel=1e-12)
    assert mean["k3"] == pytest.approx(exact, rel=1e-12)
    assert mean["k2"] == pytest.approx(exact, rel=0.1) and mean["k2"] != pytest.approx(exact, rel=1e-6)
    assert np.min(kl_estimate(np.log(p), np.log(q), "k1")) < 0
    assert min(np.min(kl_estimate(np.log(p), np.log(q), name)) for name in ("k2", "k3")) >= 0


def test_k3_keeps_small_differences():
    """exp(-d) - 1 + d loses every digit in float32 below 1e-4; expm1 keeps them."""
    small = np.float32([1e-3])
    assert float(kl_estimate(small, 0 * small, "k3")[0]) == pytest.approx(5e-7, rel=1e-2)


def test_score_comes_at_the_last_real_token(x64):
    mask = np.array([[True, True, False], [True, True, True], [False, False, False]])
    kl = np.full((3, 3), 2.0)
    got = token_rewards(np.array([0.5, -1.5, 9.0]), kl, mask, 0.25)
    np.testing.assert_allclose(got, [[-0.5, 0.0, 0.0], [-0.5, -0.5, -2.0], [0, 0, 0]], atol=1e-12)
    assert last_real(mask).tolist() == [[False, True, False], [False, False, True], [False] * 3]


@pytest.mark.parametrize("observed,factor", [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98), (-5.0, 0.98)])
def test_adaptive_coefficient_by_hand(x64, observed, factor):
    got = adapt_kl_coef(jnp.float64(0.2), jnp.float64(observed), 1000, target=6.0, horizon=10_000)
    assert float(got) == pytest.approx(0.2 * factor, abs=1e-12)


def policy_inputs(rng, rows=5, width=7):
    mask = ragged(rng, rows, width)
    new, old, ref, advantages = rng.normal(size=(4, *mask.shape)) * 0.3
    return new - 1, old - 1, ref - 1, advantages, mask


def policy_loop(new, old, ref, advantages, mask, clip):
    out = {"loss": 0.0, "clipped": 0, "ratio": 0.0, "approxkl": 0.0, "ref": 0.0}
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(new[b, t] - old[b, t])
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        plain, other = -advantages[b, t] * ratio, -advantages[b, t] * bounded
        out["loss"] += max(plain, other)
        out["clipped"] += other > plain
        out["ratio"] += ratio
        out["approxkl"] += 0.5 * (new[b, t] - old[b, t]) ** 2
        out["ref"] += math.exp(ref[b, t] - new[b, t]) - 1 - (ref[b, t] - new[b, t])
    return out


def test_policy_loss_is_the_loop(x64):
    inputs = policy_inputs(np.random.default_rng(4))
    terms, loop = policy_loss(*inputs, clip_range=0.2), policy_loop(*inputs, 0.2)
    count = inputs[-1].sum()
    assert float(terms.weight.sum()) == count
    assert float((terms.loss * terms.weight).sum()) == pytest.approx(loop["loss"], abs=1e-12)
    for metric, name in {
        "policy/approxkl": "approxkl",
        "policy/clipfrac": "clipped",
        "policy/ref_kl": "ref",
        "val/ratio": "ratio",
    }.items():
        total, weight = terms.metrics[metric]
        assert float(weight) == count
        assert float(total) == pytest.approx(loop[name], abs=1e-12), metric


def test_policy_gradient_is_the_loop(x64):
    """d/dlogp of max(-A rho, -A clip(rho)) is -A rho where the clip does not bind, else 0."""
    new, old, ref, advantages, mask = policy_inputs(np.random.default_rng(5))
    gradient = jax.grad(lambda x: policy_loss(x, old, ref, advantages, mask, clip_range=0.2).loss.sum())(new)
    ratio = np.exp(new - old)
    binds = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    np.testing.assert_allclose(gradient, np.where(mask & ~binds, -advantages * ratio, 0), atol=1e-12)


def test_on_policy_gradient_is_whole(x64):
    """At rho = 1 exactly, where both branches of the max tie, the gradient is -A, not half of it."""
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    gradient = jax.grad(lambda x: policy_loss(x, zero, zero, one, one > 0, clip_range=0.2).loss.sum())(zero)
    assert gradient.tolist() == [[-1.0, -1.0]]
    gradient = jax.grad(lambda v: value_loss(v, zero, one, one > 0, clip_range=0.2).loss.sum())(zero)
    assert gradient.tolist() == [[-1.0, -1.0]]


def test_entropy_bonus(x64):
    new, old, ref, advantages, mask = policy_inputs(np.random.default_rng(6))
    entropy = np.random.default_rng(7).uniform(0, 3, mask.shape)
    options = {"clip_range": 0.2, "entropy": entropy}
    without = policy_loss(new, old, ref, advantages, mask, **options)
    with_bonus = policy_loss(new, old, ref, advantages, mask, **options, entropy_coef=0.01)
    np.testing.assert_allclose(without.loss - with_bonus.loss, np.where(mask, 0.01 * entropy, 0), atol=1e-12)
    total, weight = with_bonus.metrics["policy/entropy"]
    assert float(total / weight) == pytest.approx(entropy[mask].mean(), abs=1e-12)
    with pytest.raises(ValueError, match="without entropies"):
        policy_loss(new, old, ref, advantages, mask, clip_range=0.2, entropy_coef=0.01)


def test_trap_value_loss_has_the_half(x64):
    """0.5 * max((V - R)^2, (clipped - R)^2), by a loop; metrics over real tokens."""
    rng = np.random.default_rng(8)
    mask = ragged(rng)
    values, old, returns = rng.normal(size=(3, *mask.shape))
    terms = value_loss(values, old, returns, mask, clip_range=0.3)
    total, clipped = 0.0, 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        bounded = old[b, t] + min(max(values[b, t] - old[b, t], -0.3), 0.3)
        plain, other = (values[b, t] - returns[b, t]) ** 2, (bounded - returns[b, t]) ** 2
        total += 0.5 * max(plain, other)
        clipped += other > plain
    assert float(terms.loss.sum()) == pytest.approx(total, abs=1e-12)
    assert float(terms.metrics["val/clipfrac"][0]) == clipped
    assert float(terms.metrics["val/clipfrac"][1]) == mask.sum()


def test_trap_masked_statistics(x64):
    """Padding changes no statistic, whatever it holds (TRL's approx-KL, entropy and ratio are unmasked means)."""
    new, old, ref, advantages, mask = policy_inputs(np.random.default_rng(9))
    entropy = np.abs(new)
    clean = policy_loss(new, old, ref, advantages, mask, clip_range=0.2, entropy=entropy)
    dirty = policy_loss(
        *(np.where(mask, x, np.nan) for x in (new, old, ref, advantages)),
        mask,
        clip_range=0.2,
        entropy=np.where(mask, entropy, np.inf),
    )
    for name, (total, weight) in clean.metrics.items():
        assert float(dirty.metrics[name][0]) == float(total), name
        assert float(weight) == mask.sum()
    assert float(clean.metrics["policy/approxkl"][0] / mask.sum()) != pytest.approx(
        0.5 * ((new - old) ** 2).mean(), rel=1e-3
    )
    gradient = jax.grad(lambda x: policy_loss(x, old, ref, advantages, mask, clip_range=0.2).loss.sum())(
        jnp.where(mask, new, jnp.nan)
    )
    assert np.isfinite(gradient).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 5))
def test_trap_whitening_with_masks(seed, rows, extra):
    """Masked, over all rows, biased, eps inside the root; the amount of padding does not matter."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        mask = np.arange(6) < rng.integers(1, 7, rows)[:, None]
        x = rng.normal(2, 3, mask.shape)
        got = whiten(
            jnp.asarray(np.pad(x, ((0, 0), (0, extra)), constant_values=1e6)), np.pad(mask, ((0, 0), (0, extra)))
        )
        real = x[mask]
        expected = np.where(mask, (x - real.mean()) / np.sqrt(real.var() + 1e-8), 0)  # numpy's var is biased
        np.testing.assert_allclose(got[:, :6], expected, atol=1e-9)
        kept = whiten(jnp.asarray(x), mask, shift_mean=False)
        np.testing.assert_allclose(kept, np.where(mask, expected + real.mean(), 0), atol=1e-9)


def test_bfloat16_is_computed_in_float32():
    x = jnp.ones((1, 2), jnp.bfloat16)
    assert policy_loss(x, x, x, x, x > 0, clip_range=0.2).loss.dtype == jnp.float32
    assert value_loss(x, x, x, x > 0, clip_range=0.2).loss.dtype == jnp.float32
    assert gae(x, x > 0, values=x, gamma=1.0, gae_lambda=1.0)[0].dtype == jnp.float32


def test_trap_whitening_has_eps_inside_the_root(x64):
    """A spread of 1e-4 beside eps 1e-8: x / sqrt(2e-8), not x / (1e-4 + 1e-8)."""
    found = whiten(np.array([1e-4, -1e-4, 9.0]), np.array([True, True, False]))
    np.testing.assert_allclose(found, [0.5**0.5, -(0.5**0.5), 0], rtol=1e-12)
