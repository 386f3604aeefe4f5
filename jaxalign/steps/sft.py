"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.logits import Head
from jaxalign.ops.losses_language import sft_loss
from jaxalign.ops.readout import read_with_aux, weighted_logprobs
from jaxalign.steps.objective import Objective, Sums
from jaxalign.types import Batch, Params


def sft_objective(
    apply: Callable[..., Any], head: Callable[[Params], jax.Array | Head], *, entropy: bool = False
) -> Objective:
    """The mean negative log-likelihood of the scored tokens, each weighted by its completion.

    Args:
      apply: (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      head: params -> [D, V], or a `Head`.
      entropy: also log the mean entropy of the predicting distributions.

    Returns:
      The objective of the role "policy".
    """

    def terms(params, frozen, extra, statistics, batch: Batch) -> Sums:
        del frozen, extra, statistics
        hidden, readouts, aux = read_with_aux(apply, params["policy"], batch.rows, batch.readouts)
        weights = readout_weights(batch)
        total, logprobs, entropies = weighted_logprobs(
            hidden, head(params["policy"]), readouts, weights, entropy=entropy
        )
        found = sft_loss(logprobs, weights, entropy=entropies)
        counts = {"tokens": jnp.sum(weights != 0)}
        return Sums({"policy": -total}, found.metrics, counts, {"policy": aux})  # the sum of what sft_loss gives

    return Objective(lambda batch: {"policy": jnp.sum(readout_weights(batch))}, terms)


def readout_weights(batch: Batch) -> jax.Array:
    """Weight of each readout, [B, M]: that of its completion, 0 where either is masked."""
    completions = batch.completions
    weights = jnp.where(completions.mask, completions.weight, 0)
    return jnp.where(
        batch.readouts.mask, jnp.take_along_axis(weights, batch.readouts.completion, axis=1, mode="clip"), 0
    )
