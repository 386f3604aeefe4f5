"""Losses and gradients through the model equal TRL 1.16's, stored by tests/oracle/test_losses_trl.py."""

import numpy as np
import pytest

from jaxalign.ops.losses_preference import PREFERENCE_LOSSES
from jaxalign.ops.losses_reward import reward_loss
from tests.steps.peer_cases import BETA, CENTER, GOLDEN, SMOOTHED, compare, ours


def stored(prefix):
    with np.load(GOLDEN) as golden:
        found = {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}
    assert found, prefix
    return found


@pytest.mark.parametrize("algorithm", ["sft", "ipo", "reward"])
def test_tiny_model(algorithm):
    compare(ours("tiny", algorithm, None), stored(f"tiny/{algorithm}/"))


def test_real_model(shared):
    compare(ours("stories260k-llama", "sigmoid", shared), stored("stories260k-llama/sigmoid/"))


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if name not in ("dpop", "rdpo")])
def test_preference_loss_on_the_same_logprobs(name, x64):
    """float64, to 1e-12, values and gradients."""
    import jax

    peer = stored(f"function/{name}/")
    pair = lambda x: {"chosen": x[:, 0], "rejected": x[:, 1]}  # noqa: E731

    def mean(policy):
        terms = PREFERENCE_LOSSES[name](
            pair(policy), pair(peer["ref"]), pair(peer["lengths"]), np.ones(len(policy), bool), beta=BETA,
            **SMOOTHED.get(name, {}),
        )  # fmt: skip
        return (terms.loss * terms.weight).sum() / terms.weight.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean))(peer["policy"])
    np.testing.assert_allclose(loss, peer["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, peer["gradient"], rtol=1e-12, atol=1e-15)


def test_reward_loss_on_the_same_scores(x64):
    import jax

    peer = stored("function/reward/")

    def mean(scores):
        mask = np.ones(len(scores), bool)
        terms = reward_loss(scores[:, 0], scores[:, 1], mask, margin=peer["margin"], center_coef=CENTER)
        return (terms.loss * terms.weight).sum() / terms.weight.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean))(peer["scores"])
    np.testing.assert_allclose(loss, peer["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, peer["gradient"], rtol=1e-12, atol=1e-15)
