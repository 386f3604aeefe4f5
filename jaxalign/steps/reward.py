"""Reward modelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.losses_reward import reward_loss
from jaxalign.ops.readout import completion_sums, read_hidden, scalar_readout
from jaxalign.steps.preference import by_pair
from jaxalign.steps.step import Objective, Sums, reduce_terms
from jaxalign.types import Batch, Params


def completion_scores(
    apply: Callable[..., Any], kernel: Callable[[Params], jax.Array], params: Params, batch: Batch
) -> jax.Array:
    """Score of each completion, [B, C], read at its one readout: its last real token, wherever the padding is."""
    hidden, readouts = read_hidden(apply, params, batch.rows, batch.readouts)
    scores = scalar_readout(hidden, kernel(params), readouts)
    return completion_sums(scores, readouts, batch.completions.mask.shape[1])


def reward_objective(
    apply: Callable[..., Any],
    kernel: Callable[[Params], jax.Array],
    *,
    label_smoothing: float,
    center_coef: float,
    use_margin: bool,
) -> Objective:
    """The mean Bradley-Terry loss over the batch's pairs, each weighted by its record.

    Args:
      apply: (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      kernel: params -> [D, 1], the scalar head.
      label_smoothing: share of labels taken to be wrong.
      center_coef: weight of the squared sum of a pair's scores.
      use_margin: subtract the chosen completion's `score` column from the difference.

    Returns:
      The objective of the role "reward".  Its count `tokens` is of scores, one a completion.
    """

    def objective(params, frozen, extra, batch: Batch) -> Sums:
        del frozen, extra
        scores = by_pair(completion_scores(apply, kernel, params["reward"], batch), batch)
        weights = by_pair(batch.completions.weight, batch)["chosen"]
        terms = reward_loss(
            scores["chosen"],
            scores["rejected"],
            weights,
            margin=by_pair(batch.completions.score, batch)["chosen"] if use_margin else None,
            center_coef=center_coef,
            label_smoothing=label_smoothing,
        )
        return Sums({"reward": reduce_terms(terms)}, terms.metrics, {"tokens": jnp.sum(batch.readouts.mask)})

    return objective
