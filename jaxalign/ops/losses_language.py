"""The language-model loss."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_sum
from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Terms


def sft_loss(logprobs: jax.Array, weights: jax.Array, *, entropy: jax.Array | None = None) -> Terms:
    """Negative log-likelihood of each scored token.

    loss = -log pi(y_t | x, y_<t)

    The batch's loss is the mean over all scored tokens of all micro-batches and devices, as in TRL's SFTTrainer.

    Args:
      logprobs: [N, R] log-probs of the tokens, in nats.
      weights: [N, R] bool mask or weights; 0 leaves a token out.
      entropy: [N, R] entropies of the predicting distributions, in nats, only to be logged.

    Returns:
      Terms with loss [N, R]; metrics `logps/completion` (mean log-prob of a token) and, where given, `entropy`.

    >>> terms = sft_loss(jnp.array([[-1.0, -3.0]]), jnp.array([[True, False]]))
    >>> print(terms.loss, terms.weight)
    [[ 1. -0.]] [[1. 0.]]
    """
    chex.assert_rank([logprobs, weights], 2)
    chex.assert_equal_shape([logprobs, weights])
    logprobs = jnp.where(weights != 0, at_least_float32(logprobs), 0)
    weights = weights.astype(logprobs.dtype)
    total = jnp.sum(weights)
    metrics = {"logps/completion": (masked_sum(logprobs, weights), total)}
    if entropy is not None:
        metrics["entropy"] = (masked_sum(entropy, weights), total)
    return Terms(-logprobs, weights, metrics)
