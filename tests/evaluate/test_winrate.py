import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from jaxalign.evaluate.winrate import verdict, wilson, win_rate


@pytest.mark.parametrize("wins,items", [(0, 1), (1, 1), (0, 30), (30, 30), (8, 10), (55, 100), (731, 1000), (5, 9)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(wins, items, confidence):
    ours = wilson(wins, items, confidence=confidence)
    theirs = binomtest(wins, items).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), rtol=1e-12, atol=1e-12)


def test_a_tie_is_half_a_win():
    result = win_rate([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.5])
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert result.rate == 0.5
    assert (result.low, result.high) == wilson(2.0, 4, confidence=0.95)


def test_unknown_scores_are_left_out():
    result = win_rate([None, 1.0, math.nan, 0.0], [1.0, None, 1.0, 1.0])
    assert (result.wins, result.ties, result.losses, result.rate) == (1, 0, 0, 1.0)


def test_no_items():
    result = win_rate([], [])
    assert math.isnan(result.rate)
    assert (result.low, result.high) == (0.0, 1.0)
    assert result.verdict.startswith("undecided")


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 scores of the base model, 1 of the aligned"):
        win_rate([1.0, 2.0], [1.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, confidence=confidence)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_swapping_the_models_mirrors_the_interval(pairs):
    base, aligned = zip(*pairs, strict=True)
    a, b = win_rate(base, aligned), win_rate(aligned, base)
    assert a.wins == b.losses and a.ties == b.ties
    np.testing.assert_allclose([a.rate, a.low, a.high], [1 - b.rate, 1 - b.high, 1 - b.low], atol=1e-12)
    assert a.low <= a.rate <= a.high


@pytest.mark.parametrize(
    "low,high,word",
    [
        (0.56, 0.7, "better: the whole interval is above 55"),
        (0.51, 0.6, "better: the whole interval is above 50"),
        (0.45, 0.6, "undecided"),
        (0.3, 0.49, "worse"),
    ],
)
def test_verdict_reads_the_interval_against_both_lines(low, high, word):
    assert verdict(low, high).startswith(word)


def test_coverage_by_simulation():
    """An interval of 90 % holds the truth about 90 times in 100."""
    random = np.random.default_rng(0)
    wins = random.binomial(50, 0.55, size=2000)
    inside = np.mean([low <= 0.55 <= high for low, high in (wilson(int(w), 50, confidence=0.9) for w in wins)])
    assert 0.87 < inside < 0.93
