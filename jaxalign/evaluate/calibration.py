"""Expected calibration error (ECE) of pairwise preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bin(NamedTuple):
    """A bin of predictions with similar confidence."""

    weight: float  # of its predictions together
    confidence: float  # their mean
    accuracy: float  # share that is right; a tie counts half


def calibration(
    margins: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None, *, num_bins: int = 10
) -> tuple[float, list[Bin]]:
    """The expected calibration error of pairwise preferences, and its bins.

    A margin m says that the chosen completion is better with probability p = s(m); the model's confidence in its own
    verdict is max(p, 1 - p), and it is right where m > 0.  Over bins of equal width between 1/2 and 1,

        ECE = sum_b (w_b / w) |accuracy_b - confidence_b|

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.

    Args:
      margins: r(chosen) - r(rejected) of each pair, in units of log-odds.
      weights: of the pairs; None: all alike.
      num_bins: between 1/2 and 1.

    Returns:
      The error, between 0 and 1 (nan without pairs, or where a margin is), and the bins that hold any.

    >>> error, bins = calibration([2.2, 2.2, 2.2, -2.2])
    >>> round(error, 2), bins[0].accuracy
    (0.15, 0.75)
    """
    margin = np.asarray(margins, np.float64)
    weight = np.ones_like(margin) if weights is None else np.asarray(weights, np.float64)
    if not weight.sum() or np.isnan(margin[weight > 0]).any():
        return math.nan, []
    confidence = 1 / (1 + np.exp(-np.abs(np.where(weight > 0, margin, 0))))
    right = np.where(margin == 0, 0.5, margin > 0)
    place = np.minimum((2 * num_bins * (confidence - 0.5)).astype(int), num_bins - 1)
    bins = []
    for number in range(num_bins):
        here = (place == number) & (weight > 0)
        if total := float(weight[here].sum()):
            means = (float((weight * values)[here].sum() / total) for values in (confidence, right))
            bins.append(Bin(total, *means))
    return sum(b.weight * abs(b.accuracy - b.confidence) for b in bins) / float(weight.sum()), bins
