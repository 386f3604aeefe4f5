"""What a whole step may get wrong beside its loss: randomness, a reference that moves, an option that is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.readout import take_sources
from jaxalign.rewards.model import score_rows
from jaxalign.steps.preference import preference_objective, sequence_logprobs
from jaxalign.steps.reward import reward_objective
from jaxalign.steps.step import make_eval_step
from tests.steps.worlds import ALGORITHMS, data, model, objective, start


def primitives(jaxpr):
    """The names of every operation in a program and those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def draws(function, *args):
    """Operations that make or use random numbers."""
    names = set(primitives(jax.make_jaxpr(function)(*args).jaxpr))
    assert "dot_general" in names and "scan" in names  # the layers have been looked into
    return {name for name in names if any(word in name for word in ("random", "threefry", "rng", "erf_inv"))}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trap_no_dropout_in_training_reference_or_scoring(algorithm, x64):
    """TRAPS.md, dropout: policy, reference, value, reward are functions of parameters and tokens alone."""
    params, frozen = start(algorithm)
    batch = data(algorithm)

    def gradient(params, frozen, batch):
        sums = lambda p: make_eval_step(objective(algorithm, "full"))(p, frozen, {}, batch)  # noqa: E731
        return jax.grad(lambda p: sum(s[0].sum() for name, s in sums(p).items() if name.startswith("loss")))(params)

    assert not draws(gradient, params, frozen, batch)
    if algorithm == "reward":
        rows, last = batch.rows, batch.readouts.source[:, 0]
        assert not draws(lambda p: score_rows(model("score"), p, rows, last), params["reward"])
    if frozen:
        lm = model("lm")
        assert not draws(lambda p: sequence_logprobs(lm.apply, lm.head, p, batch), frozen["ref"])


def linear(kernel, rows, *, sources):
    """A model of one number: the hidden state of each token is its kernel's row."""
    return jnp.take(kernel, take_sources(rows.tokens, sources), axis=0), None, {}


TABLE = np.random.default_rng(0).normal(size=(32, 32))


def test_trap_the_reference_in_a_step_is_the_frozen_one(x64):
    """TRAPS.md, the reference drifts: the implicit reward is the distance from the frozen parameters, not from the
    policy's own, and the reference gets no gradient."""
    identity = lambda _: jnp.eye(32)  # noqa: E731
    loss = make_eval_step(
        preference_objective(linear, identity, loss="sigmoid", beta=0.5, label_smoothing=0.0, reference="live")
    )
    batch, ref = data("dpo"), jnp.asarray(TABLE)

    @jax.jit
    def margin(policy, ref):
        total, weight = loss({"policy": policy}, {"ref": ref}, {}, batch)["rewards/margins"]
        return total / weight

    assert margin(ref, ref) == 0
    moved = ref + jnp.asarray(np.random.default_rng(1).normal(size=ref.shape))
    logprobs = jax.jit(lambda p: sequence_logprobs(linear, identity, p, batch))
    gap = logprobs(moved) - logprobs(ref)
    weight = batch.completions.weight[:, 0]
    expected = 0.5 * np.sum(weight * (gap[:, 0] - gap[:, 1])) / np.sum(weight)
    assert abs(expected) > 0.05
    np.testing.assert_allclose(margin(moved, ref), expected, rtol=1e-12)
    of_ref = jax.grad(lambda ref: loss({"policy": moved}, {"ref": ref}, {}, batch)["loss"][0])(ref)
    assert not of_ref.any()


@pytest.mark.parametrize("algorithm", ["dpo", "reward"])
def test_trap_label_smoothing_reaches_the_loss(algorithm, x64):
    """TRAPS.md: with half the labels taken to be wrong, the loss is the same for both orders of a pair."""
    apply, ones = linear, lambda _: jnp.ones((32, 1))

    def mean(smoothing, flipped):
        batch = data(algorithm)
        if flipped:
            completions = batch.completions
            batch = batch._replace(
                completions=completions._replace(role=np.where(completions.mask, 1 - completions.role, 0))
            )
        if algorithm == "reward":
            loss = reward_objective(apply, ones, label_smoothing=smoothing, center_coef=0.0, use_margin=False)
            params, frozen = {"reward": jnp.asarray(TABLE)}, {}
        else:
            loss = preference_objective(
                apply, lambda _: jnp.eye(32), loss="sigmoid", beta=0.5, label_smoothing=smoothing, reference="live"
            )
            params, frozen = {"policy": jnp.asarray(TABLE)}, {"ref": jnp.asarray(TABLE[::-1].copy())}
        total, weight = make_eval_step(loss)(params, frozen, {}, batch)["loss"]
        return float(total / weight)

    assert abs(mean(0.0, False) - mean(0.0, True)) > 0.1
    np.testing.assert_allclose(mean(0.5, False), mean(0.5, True), rtol=1e-12)
    np.testing.assert_allclose(mean(0.2, False), 0.8 * mean(0.0, False) + 0.2 * mean(0.0, True), rtol=1e-12)
