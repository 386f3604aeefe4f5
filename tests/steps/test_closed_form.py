"""On a space small enough to enumerate, both roads end at pi_ref exp(r / beta) / Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.losses_preference import sigmoid_loss

PROMPTS, ANSWERS, BETA = 3, 6, 0.4


@pytest.fixture
def world(x64):
    rng = np.random.default_rng(0)
    reward = jnp.asarray(rng.normal(size=(PROMPTS, ANSWERS)))
    log_ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(PROMPTS, ANSWERS))))
    return reward, log_ref, jax.nn.log_softmax(log_ref + reward / BETA)


def dpo(logits, log_ref, reward, label_smoothing=0.0):
    """DPO's loss over every ordered pair of answers, weighted by the exact Bradley-Terry probability of the label."""
    x, i, j = (a.ravel() for a in np.meshgrid(np.arange(PROMPTS), *[np.arange(ANSWERS)] * 2, indexing="ij"))
    log_policy = jax.nn.log_softmax(logits)
    policy = {"chosen": log_policy[x, i], "rejected": log_policy[x, j]}
    ref = {"chosen": log_ref[x, i], "rejected": log_ref[x, j]}
    p = jax.nn.sigmoid(reward[x, i] - reward[x, j])
    ones = {"chosen": jnp.ones_like(p), "rejected": jnp.ones_like(p)}
    weight = jnp.where(i != j, p, 0)
    terms = sigmoid_loss(policy, ref, ones, weight, beta=BETA, label_smoothing=label_smoothing)
    return jnp.sum(terms.loss * terms.weight) / jnp.sum(terms.weight)


def regularised(logits, log_ref, reward):
    """-E[r] + beta KL(policy || reference), exact, mean over the prompts."""
    log_policy = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_policy) * (reward - BETA * (log_policy - log_ref)), axis=-1))


def minimise(loss, start):
    """Newton's method with a ridge that vanishes: the optimum to the last digits, in one compiled loop."""

    def step(_, x):
        gradient, hessian = jax.grad(loss)(x), jax.hessian(loss)(x).reshape(x.size, x.size)
        # Softmax ignores a constant, so the Hessian has a null space; the ridge is damping as well.
        ridge = 1e-12 + jnp.linalg.norm(gradient)
        return x - jnp.linalg.solve(hessian + ridge * jnp.eye(x.size), gradient.ravel()).reshape(x.shape)

    return jax.jit(lambda x: jax.lax.fori_loop(0, 60, step, x))(start)


@pytest.mark.parametrize("objective", [dpo, regularised])
def test_both_roads_reach_the_closed_form(objective, world):
    reward, log_ref, optimum = world
    found = jax.nn.log_softmax(minimise(lambda x: objective(x, log_ref, reward), log_ref))
    np.testing.assert_allclose(jnp.exp(found), jnp.exp(optimum), rtol=0, atol=1e-8)
    assert np.abs(np.exp(optimum) - np.exp(log_ref)).max() > 0.2  # the reference is far from there


def test_the_implicit_reward_is_the_reward_up_to_a_constant(world):
    reward, log_ref, optimum = world
    implicit = BETA * (optimum - log_ref)
    difference = implicit - reward
    np.testing.assert_allclose(difference - difference.mean(axis=1, keepdims=True), 0, atol=1e-12)


def test_gradient_of_dpo_vanishes_there_and_that_of_cdpo_does_not(world):
    reward, log_ref, optimum = world
    gradient = jax.jit(jax.grad(dpo), static_argnums=3)
    assert np.abs(gradient(optimum, log_ref, reward)).max() < 1e-15
    assert np.abs(gradient(optimum, log_ref, reward, 0.1)).max() > 1e-3
