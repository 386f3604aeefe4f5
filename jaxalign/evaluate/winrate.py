"""Win rates between two models, with Wilson intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

HARM = 0.50  # below: the aligned model is worse than its base
GOOD = 0.55  # above: what practitioners' guides call a good result


class WinRate(NamedTuple):
    """How often the second of two models is preferred; ties count half."""

    wins: int  # items where the second is better
    ties: int
    losses: int
    rate: float  # (wins + ties / 2) / items, from 0 to 1; nan without items
    low: float  # bounds of the Wilson interval, from 0 to 1
    high: float
    confidence: float
    verdict: str  # the interval against the lines at 50 and 55 %, in words


def win_rate(base: Sequence[float], aligned: Sequence[float], *, confidence: float = 0.95) -> WinRate:
    """How often `aligned` scores above `base`, item by item.

    A tie is half a win.  Items where either score is None or not a number are left out.

    Args:
      base: score of the first model's completion for each prompt, higher is better; None where there is none.
      aligned: the second model's, for the same prompts in the same order.
      confidence: of the interval, between 0 and 1.

    Returns:
      Counts, rate, Wilson interval and verdict.

    Raises:
      ValueError: where the two lengths differ.

    >>> r = win_rate([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 5.0, 2.0])
    >>> r.wins, r.ties, r.losses, r.rate
    (2, 1, 1, 0.625)
    """
    if len(base) != len(aligned):
        raise ValueError(f"{len(base)} scores of the base model, {len(aligned)} of the aligned one")
    pairs = [(a, b) for a, b in zip(base, aligned, strict=True) if _known(a) and _known(b)]
    wins = sum(b > a for a, b in pairs)
    ties = sum(b == a for a, b in pairs)
    losses = len(pairs) - wins - ties
    rate = (wins + ties / 2) / len(pairs) if pairs else math.nan
    low, high = wilson(wins + ties / 2, len(pairs), confidence=confidence)
    return WinRate(wins, ties, losses, rate, low, high, confidence, verdict(low, high))


def wilson(wins: float, items: int, *, confidence: float) -> tuple[float, float]:
    """The Wilson score interval of a proportion.

    With p = wins / n and z the normal quantile at (1 + confidence) / 2:

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays inside [0, 1] and does not collapse where all items agree.
    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.

    Args:
      wins: number of wins; a tie may count half.
      items: number of comparisons.
      confidence: between 0 and 1.

    Returns:
      Lower and upper bound; (0, 1) without items.

    >>> [round(x, 4) for x in wilson(8, 10, confidence=0.95)]
    [0.4902, 0.9433]
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    if items == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = wins / items
    centre = p + z * z / (2 * items)
    half = z * math.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    # rounding can put p just outside the interval where all items agree
    return max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale))


def verdict(low: float, high: float) -> str:
    """The interval of a win rate against the lines at 50 % (harm below) and 55 % (good above), in words.

    >>> verdict(0.61, 0.70)
    'better: the whole interval is above 55 %'
    """
    if low > GOOD:
        return "better: the whole interval is above 55 %"
    if low > HARM:
        return "better: the whole interval is above 50 %, not all of it above 55 %"
    if high < HARM:
        return "worse: the whole interval is below 50 %"
    return "undecided: the interval holds 50 %; more prompts would narrow it"


def _known(score) -> bool:
    return score is not None and not math.isnan(score)
