"""Diversity of samples: distinct-n, repetition, distinct samples, length-reward correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence


def distinct_ngrams(samples: Sequence[Sequence], n: int) -> float:
    """Share of n-grams that are distinct, over all samples together.

    It falls when a model collapses to a few phrases.  Source: Li et al. 2016, arXiv 1510.03055, section 5
    (distinct-1 and distinct-2).  It also falls as the samples grow in number or length: compare equal amounts.

    Args:
      samples: token ids or words of each sample.
      n: at least 1.

    Returns:
      Between 0 and 1; nan where no sample has n tokens.

    >>> distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [gram for sample in samples for gram in _ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(samples: Sequence[Sequence], n: int) -> float:
    """Mean over samples of the share of repeated n-grams (seq-rep-n).

        rep_n(x) = 1 - distinct n-grams of x / n-grams of x

    Source: Welleck et al. 2020, arXiv 1908.04319, section 6 (seq-rep-n).

    Args:
      samples: token ids or words of each sample.
      n: at least 1.

    Returns:
      Between 0 (nothing repeats) and 1; nan where no sample has n tokens.

    >>> repetition([[7, 7, 7, 7, 7], [1, 2, 3]], 1)
    0.4
    """
    rates = []
    for sample in samples:
        grams = list(_ngrams(sample, n))
        if grams:
            rates.append(1 - len(set(grams)) / len(grams))
    return math.fsum(rates) / len(rates) if rates else math.nan


def distinct_samples(samples: Sequence[Sequence]) -> float:
    """Share of distinct samples: 1 where no two prompts get the same answer.

    >>> distinct_samples(["yes", "yes", "no", "yes"])
    0.5
    """
    return len({s if isinstance(s, str) else tuple(s) for s in samples}) / len(samples) if samples else math.nan


def length_correlation(lengths: Sequence[float], scores: Sequence[float]) -> float:
    """Pearson correlation of the samples' lengths and scores: near 1, the reward mostly rewards length.

    Args:
      lengths: of each sample, in tokens or words.
      scores: of each sample.

    Returns:
      Between -1 and 1; nan with fewer than two samples, or where either does not vary.

    >>> round(length_correlation([1, 2, 3], [2.0, 4.0, 6.0]), 6)
    1.0
    """
    if len(lengths) != len(scores):
        raise ValueError(f"{len(lengths)} lengths for {len(scores)} scores")
    if len(lengths) < 2:
        return math.nan
    x = [v - math.fsum(lengths) / len(lengths) for v in lengths]
    y = [v - math.fsum(scores) / len(scores) for v in scores]
    spread = math.sqrt(math.fsum(v * v for v in x)) * math.sqrt(math.fsum(v * v for v in y))
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def _ngrams(sample: Sequence, n: int):
    if n < 1:
        raise ValueError(f"n is {n}, at least 1")
    return (tuple(sample[i : i + n]) for i in range(len(sample) - n + 1))
