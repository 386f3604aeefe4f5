"""Perplexity from summed log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def perplexity(sum_logprobs: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Perplexity: exp of the mean negative log-prob of a token.

        exp(-sum_i logprob_i / sum_i tokens_i)

    Every token weighs the same; a mean over texts of their own perplexities would not.

    Args:
      sum_logprobs: summed log-prob of each text, in nats.
      num_tokens: tokens that each sum runs over.

    Returns:
      The perplexity, at least 1; nan without tokens, inf where it exceeds the largest float.

    Raises:
      ValueError: where the two lengths differ.

    >>> round(perplexity([-2.0, -4.0], [2, 4]), 4)
    2.7183
    """
    if len(sum_logprobs) != len(num_tokens):
        raise ValueError(f"{len(sum_logprobs)} sums for {len(num_tokens)} token counts")
    tokens = sum(num_tokens)
    if not tokens:
        return math.nan
    try:
        return math.exp(-math.fsum(sum_logprobs) / tokens)
    except OverflowError:
        return math.inf
