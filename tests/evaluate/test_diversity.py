import math

import numpy as np
import pytest
from scipy.stats import pearsonr

from jaxalign.evaluate.diversity import distinct_ngrams, distinct_samples, length_correlation, repetition
from jaxalign.evaluate.perplexity import perplexity


def test_distinct_ngrams_by_hand():
    samples = [["the", "cat", "the", "cat"], ["the", "dog"]]
    assert distinct_ngrams(samples, 1) == 3 / 6
    assert distinct_ngrams(samples, 2) == 3 / 4  # the cat, cat the, the dog of four
    assert distinct_ngrams(samples, 3) == 2 / 2
    assert math.isnan(distinct_ngrams(samples, 5))
    assert math.isnan(distinct_ngrams([], 1))


def test_ngrams_do_not_cross_samples():
    assert distinct_ngrams([[1], [2]], 1) == 1.0
    assert math.isnan(distinct_ngrams([[1], [2]], 2))


def test_repetition_by_hand():
    assert repetition([[1, 2, 1, 2, 1]], 2) == 1 - 2 / 4
    assert repetition([[1, 1, 1, 1], [1, 2, 3, 4]], 1) == (0.75 + 0) / 2
    assert repetition([[1, 2, 3]], 2) == 0
    assert math.isnan(repetition([[1]], 2))


def test_collapse_across_prompts_shows_where_repetition_does_not():
    samples = [[1, 2, 3]] * 10
    assert repetition(samples, 1) == 0
    assert distinct_samples(samples) == 0.1
    assert distinct_ngrams(samples, 1) == 0.1


@pytest.mark.parametrize("measure", [distinct_ngrams, repetition])
def test_n_is_at_least_one(measure):
    with pytest.raises(ValueError, match="at least 1"):
        measure([[1, 2]], 0)


def test_length_correlation_equals_scipy():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, size=40)
    scores = 0.1 * lengths + random.normal(size=40)
    np.testing.assert_allclose(length_correlation(lengths, scores), pearsonr(lengths, scores).statistic, rtol=1e-12)
    assert math.isnan(length_correlation([3, 3], [1.0, 2.0]))
    assert math.isnan(length_correlation([3], [1.0]))


def test_perplexity_weighs_tokens_not_texts():
    sums, tokens = [-1.0, -30.0], [1, 10]
    assert perplexity(sums, tokens) == math.exp(31 / 11)
    assert math.isnan(perplexity([], []))
    assert math.isnan(perplexity([0.0], [0]))
    assert perplexity([-1e6], [1]) == math.inf
    with pytest.raises(ValueError, match="1 sums for 2"):
        perplexity([1.0], [1, 2])


def test_uniform_model_has_the_vocabulary_size_as_perplexity():
    np.testing.assert_allclose(perplexity([-7 * math.log(512)], [7]), 512, rtol=1e-12)
