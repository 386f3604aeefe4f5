"""Reward modelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.losses_reward import reward_loss
from jaxalign.ops.readout import completion_sums, read_with_aux, scalar_readout
from jaxalign.steps.objective import Objective, Sums, weighted_sum
from jaxalign.steps.preference import by_pair, pair_weights
from jaxalign.types import Batch, Params


def completion_scores(
    apply: Callable[..., Any], kernel: Callable[[Params], jax.Array], params: Params, batch: Batch
) -> jax.Array:
    """Score of each completion, [B, C], read at its one readout: its last real token, wherever the padding is."""
    return scores_and_aux(apply, kernel, params, batch)[0]


def scores_and_aux(apply, kernel, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `completion_scores`, and the model's auxiliary sums."""
    hidden, readouts, aux = read_with_aux(apply, params, batch.rows, batch.readouts)
    scores = scalar_readout(hidden, kernel(params), readouts)
    return completion_sums(scores, readouts, batch.completions.mask.shape[1]), aux


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

    def terms(params, frozen, extra, statistics, batch: Batch) -> Sums:
        del frozen, extra, statistics
        each, aux = scores_and_aux(apply, kernel, params["reward"], batch)
        scores = by_pair(each, batch)
        found = reward_loss(
            scores["chosen"],
            scores["rejected"],
            pair_weights(batch),
            margin=by_pair(batch.completions.score, batch)["chosen"] if use_margin else None,
            center_coef=center_coef,
            label_smoothing=label_smoothing,
        )
        counts = {"tokens": jnp.sum(batch.readouts.mask)}
        return Sums({"reward": weighted_sum(found)}, found.metrics, counts, {"reward": aux})

    return Objective(lambda batch: {"reward": jnp.sum(pair_weights(batch))}, terms)
