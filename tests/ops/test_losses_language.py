"""The language-model loss."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops.losses_language import sft_loss


def test_equals_a_loop(x64):
    rng = np.random.default_rng(0)
    logprobs, entropy = -rng.exponential(size=(4, 6)), rng.exponential(size=(4, 6))
    weights = rng.uniform(0.5, 2, (4, 6)) * (rng.random((4, 6)) < 0.6)
    hidden = jnp.where(weights != 0, logprobs, jnp.nan)

    def scalar(x):
        terms = sft_loss(x, jnp.asarray(weights), entropy=jnp.where(weights != 0, entropy, jnp.inf))
        return jnp.sum(terms.loss * terms.weight), terms

    gradient, terms = jax.jit(jax.grad(scalar, has_aux=True))(hidden)
    total = weight = mean_logprob = mean_entropy = 0.0
    for n in range(4):
        for t in range(6):
            if weights[n, t]:
                total += -logprobs[n, t] * weights[n, t]
                mean_logprob += logprobs[n, t] * weights[n, t]
                mean_entropy += entropy[n, t] * weights[n, t]
                weight += weights[n, t]
    np.testing.assert_allclose(jnp.sum(terms.loss * terms.weight), total, rtol=1e-12)
    np.testing.assert_allclose(terms.weight.sum(), weight, rtol=1e-12)
    np.testing.assert_allclose(terms.metrics["logps/completion"], (mean_logprob, weight), rtol=1e-12)
    np.testing.assert_allclose(terms.metrics["entropy"], (mean_entropy, weight), rtol=1e-12)
    np.testing.assert_allclose(gradient, -weights, rtol=1e-12)


def test_all_masked():
    terms = sft_loss(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool))
    assert terms.loss.sum() == terms.weight.sum() == 0
    assert terms.metrics["logps/completion"] == (0, 0)


def test_trap_mean_is_over_tokens_not_rows():
    """One token of loss 4 and three of loss 0: 1 over the tokens; a mean of row means would say 2."""
    terms = sft_loss(jnp.array([[-4.0, 0, 0], [0, 0, 0]]), jnp.array([[True, False, False], [True, True, True]]))
    assert jnp.sum(terms.loss * terms.weight) / jnp.sum(terms.weight) == 1
