"""Score shaping: scale, normalise, clip, missing-EOS penalty."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxalign.ops.masked import masked_mean, masked_var
from jaxalign.types import Array


def initial_statistics() -> dict[str, Array]:
    """Running statistics before any score; they are part of the train state (`extra`)."""
    return {"score_count": jnp.float32(0), "score_mean": jnp.float32(0), "score_var": jnp.float32(0)}


def merge_statistics(statistics: dict[str, Array], scores: Array, applies: Array) -> dict[str, Array]:
    """The running count, mean and biased variance, updated by a batch of scores.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm", equation 2.1.

    Args:
      statistics: as `initial_statistics`.
      scores: float [B].
      applies: bool [B], the scores that count.
    """
    chex.assert_rank([scores, applies], 1)
    count, mean, var = (statistics[f"score_{name}"] for name in ("count", "mean", "var"))
    more = jnp.sum(applies).astype(count.dtype)
    total = jnp.maximum(count + more, 1)
    gap = masked_mean(scores, applies) - mean
    return {
        "score_count": count + more,
        "score_mean": mean + jnp.where(more > 0, gap * more / total, 0),
        "score_var": jnp.where(
            more > 0, (var * count + masked_var(scores, applies) * more + gap**2 * count * more / total) / total, var
        ),
    }


def shape_scores(
    scores: Array,
    applies: Array,
    finished: Array,
    statistics: dict[str, Array] | None,
    *,
    scale: float,
    clip: float | None,
    missing_eos_penalty: float | None,
) -> Array:
    """The score that each completion is trained on.

        s <- scale * s
        s <- (s - mean) / sqrt(var + 1e-8)        with running statistics, the current scores among them
        s <- clip(s, -c, c)
        s <- s - penalty                          where no stop token ended the completion

    The penalty is last, so that neither clip nor normalisation takes it away, and it asks for any of the run's stop
    tokens, not for one EOS id.

    Args:
      scores: float [B], as the reward gave them.
      applies: bool [B], False where the reward gave None.
      finished: bool [B], ended by a stop token.
      statistics: of scaled scores; None: not normalised.
      scale: factor.
      clip: c; None: no bound.
      missing_eos_penalty: None: none.

    Returns:
      float [B]; 0 where `applies` is False.

    >>> import numpy as np
    >>> some = np.array([True, True])
    >>> given = np.float32([0.5, 3.0])
    >>> shape_scores(given, some, ~some, None, scale=1.0, clip=1.0, missing_eos_penalty=0.25).tolist()
    [0.25, 0.75]
    """
    chex.assert_rank([scores, applies, finished], 1)
    chex.assert_type([scores, applies, finished], [float, bool, bool])
    scores = scale * jnp.where(applies, scores, 0)
    if statistics is not None:
        scores = (scores - statistics["score_mean"]) / jnp.sqrt(statistics["score_var"] + 1e-8)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    if missing_eos_penalty is not None:
        scores = jnp.where(finished, scores, scores - missing_eos_penalty)
    return jnp.where(applies, scores, 0)
