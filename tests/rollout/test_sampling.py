"""Choosing tokens, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.rollout.sampling import keep_top_k, keep_top_p, sample, token_keys


def numpy_top_k(row, k):
    kept = set(np.argsort(-row, kind="stable")[:k].tolist())
    return [i in kept for i in range(len(row))]


def numpy_top_p(row, p):
    """transformers' way: the least likely tokens whose probabilities add up to at most 1 - p go."""
    order = np.argsort(row, kind="stable")
    probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    out = np.ones(len(row), bool)
    total = 0.0
    for i in order[:-1]:
        total += probs[i]
        if total > 1 - p:
            break
        out[i] = False
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 0.99))
def test_filters_are_numpys(seed, k, p):
    with jax.enable_x64(True):
        logits = np.random.default_rng(seed).normal(0, 2, (3, 11))
        assert np.isfinite(keep_top_k(logits, k)).tolist() == [numpy_top_k(r, k) for r in logits]
        got = np.asarray(keep_top_p(jnp.asarray(logits), p))
        assert np.isfinite(got).tolist() == [numpy_top_p(r, p).tolist() for r in logits]
        np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])


def test_filters_off_and_extreme():
    logits = jnp.array([[0.0, 3.0, 1.0]])
    assert keep_top_k(logits, 0) is logits and keep_top_p(logits, 1.0) is logits
    assert np.isfinite(keep_top_p(logits, 1e-6)).tolist() == [[False, True, False]]  # one token always stays
    assert np.isfinite(keep_top_k(jnp.zeros((1, 3)), 1)).all()  # ties stay together


def keys(n, seed=0):
    return token_keys(jax.random.key(seed), jnp.arange(n), 0)


def test_greedy_takes_the_first_of_equals():
    tokens, logprobs = sample(jnp.array([[1.0, 2.0, 2.0]]), keys(1), temperature=0.0)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, np.log(np.exp(2) / (np.exp(1) + 2 * np.exp(2))), rtol=1e-6)


def test_frequencies_follow_the_filtered_distribution():
    row = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    n = 4000
    tokens, logprobs = sample(jnp.tile(row, (n, 1)), keys(n), temperature=0.5, top_k=3)
    probs = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
    whole = probs / probs.sum()
    filtered = np.r_[probs[:3] / probs[:3].sum(), 0]
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / n, filtered, atol=0.03)
    # the log-prob is at the temperature and leaves top-k out
    np.testing.assert_allclose(logprobs, np.log(whole)[tokens], atol=1e-5)


def test_order_is_temperature_then_top_k_then_top_p():
    """At temperature 4 the two likeliest share less than 0.7 of all, but all of what top-k keeps."""
    row = jnp.array([[4.0, 3.0, 0.0, 0.0, 0.0]])
    tokens, _ = sample(jnp.tile(row, (200, 1)), keys(200), temperature=4.0, top_k=2, top_p=0.7)
    assert set(tokens.tolist()) == {0, 1}
    tokens, _ = sample(jnp.tile(row, (200, 1)), keys(200), temperature=0.5, top_k=2, top_p=0.7)
    assert set(tokens.tolist()) == {0}


def test_keys_depend_on_id_and_position_alone():
    def data(*args):
        return jax.random.key_data(token_keys(*args)).tolist()

    key = jax.random.key(1)
    assert data(key, jnp.array([5, 2]), 3)[0] == data(key, jnp.array([9, 5, 7]), 3)[1]
    assert data(key, jnp.array([5]), 3) != data(key, jnp.array([5]), 4)
    assert data(key, jnp.array([5]), 3) != data(key, jnp.array([3]), 5)
    expected = jax.random.fold_in(jax.random.fold_in(key, 5), 3)
    assert data(key, jnp.array([5]), 3)[0] == jax.random.key_data(expected).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_are_no_tokens_are_never_sampled_and_count_in_log_probs(temperature):
    """The log-prob is that of the whole softmax, as the training forward has it."""
    logits = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    logits[:, 9:] += 5  # likelier than every token
    options = {"temperature": temperature, "top_k": 4, "top_p": 0.9}
    tokens, logprobs = sample(jnp.asarray(logits), keys(200), num_tokens=9, **options)
    assert int(tokens.max()) < 9
    for row, token, logprob in zip(logits.astype(np.float64), np.asarray(tokens), np.asarray(logprobs), strict=True):
        assert logprob == pytest.approx(row[token] - np.log(np.exp(row).sum()), abs=1e-5)
    assert int(sample(jnp.asarray(logits), keys(200), **options)[0].max()) > 8
    alone, _ = sample(jnp.asarray(logits[:, :9]), keys(200), **options | {"temperature": 0.0})
    if not temperature:
        np.testing.assert_array_equal(tokens, alone)
