"""Reward models: the score of a text is its own, wherever its row and its padding are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.records import Record
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rewards.model import ModelScorer, padded_rows, same_tokenizer, score_rows
from jaxalign.rewards.samples import Samples
from jaxalign.rewards.score_shaping import initial_statistics, merge_statistics, shape_scores
from jaxalign.types import Rows
from tests.train.ppo_world import drawn, tiny_model


def left_padded(sequence, width, pad):
    place = np.arange(width, dtype=np.int32)[None]
    first = width - len(sequence)
    real = place >= first
    tokens = np.full((1, width), pad, np.int32)
    tokens[0, first:] = sequence
    rows = Rows(tokens, np.where(real, place - first, 0), np.where(real, first, place), place + 1)
    return rows, np.array([width - 1], np.int32)


def test_trap_score_is_its_own(x64):
    """Alone, in a batch, padded on either side by any id: the same score to 1e-9 (float64)."""
    model = tiny_model("score", dtype="float64")
    params = jax.tree.map(jnp.asarray, drawn(model, 3))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 32, n).astype(np.int32) for n in (3, 9, 1, 6)]
    together = score_rows(model, params, *padded_rows(texts))
    for i, text in enumerate(texts):
        alone = score_rows(model, params, *padded_rows([text]))
        left = [score_rows(model, params, *left_padded(text, 12, pad)) for pad in (0, 31)]
        for other in (alone[0], left[0][0], left[1][0]):
            np.testing.assert_allclose(together[i], other, atol=1e-9)
    assert together.dtype == np.float64


def test_trap_pad_equal_to_eos_moves_nothing():
    """The last index is stated: a text that ends by the padding id is read at its end, not before."""
    model = tiny_model("score")
    params = drawn(model, 3)
    text = np.array([1, 7, 0, 0], np.int32)  # ends by id 0, which padding has too
    rows, last = padded_rows([text])
    assert last.tolist() == [3]
    other = score_rows(model, params, *padded_rows([text[:2]]))
    assert abs(float(score_rows(model, params, rows, last)[0]) - float(other[0])) > 1e-3


def test_scores_are_float32_from_bfloat16_states():
    model = tiny_model("score", dtype="bfloat16")
    assert score_rows(model, drawn(model), *padded_rows([np.array([1, 2], np.int32)])).dtype == jnp.float32


@pytest.fixture(scope="module")
def scorer(shared):
    """A scalar model with minimind's tokenizer and its ChatML template."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind-6400")
    model = tiny_model("score", vocab_size=6400)
    return ModelScorer(model, tokenizer, drawn(model, 3))


def samples(prompts, completions, finished):
    n = len(prompts)
    return Samples(prompts, completions, [[1]] * n, finished, [Record(i, "", 1, "prompt") for i in range(n)], 0)


def test_text_is_rendered_by_the_models_own_template(scorer):
    tokenizer, messages = scorer.encoder.tokenizer, [{"role": "user", "content": "Hi there"}]
    ids = scorer.tokens(messages, "Hello!", True)
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Hello!"}], tokenize=True, return_dict=False
    )
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    assert ids.tolist() == whole[:end]
    assert scorer.tokens(messages, "Hello!", False).tolist() == whole[: end - 1]  # cut off: no end of turn


def test_plain_text_ends_by_eos_only_where_it_finished(scorer):
    tokenizer = scorer.encoder.tokenizer
    bare = tokenizer("Once upon a time")["input_ids"]
    assert scorer.tokens("Once upon", " a time", False).tolist() == bare
    assert scorer.tokens("Once upon", " a time", True).tolist() == [*bare, tokenizer.eos_token_id]
    assert scorer.tokens("Once upon", "", True).tolist() == [
        *tokenizer("Once upon")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_scorer_batches_do_not_matter(scorer):
    texts = ["a", "the quick brown fox", "x y", "jumps over " * 8, "z"]
    all_at_once = scorer(samples(["Say: "] * 5, texts, [True] * 5))
    two = ModelScorer(scorer.model, scorer.encoder.tokenizer, scorer.params, batch_size=2)
    np.testing.assert_allclose(all_at_once, two(samples(["Say: "] * 5, texts, [True] * 5)), atol=1e-5)
    in_parts = scorer.scores(scorer.params, samples(["Say: "] * 5, texts, [True] * 5), 6, 3)
    np.testing.assert_allclose(all_at_once, in_parts, atol=1e-5)
    assert len(set(all_at_once)) == 5


def test_scorer_on_a_mesh(scorer):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    params = jax.device_put(scorer.params, param_shardings(mesh, scorer.params))
    there = ModelScorer(scorer.model, scorer.encoder.tokenizer, params, mesh=mesh, batch_size=4)
    given = samples(["Say: "] * 5, ["a", "b c", "d", "e f g", "h"], [True] * 5)
    np.testing.assert_allclose(there(given), scorer(given), atol=1e-4)


def test_same_tokenizer(shared):
    one, same = (load_tokenizer(shared / "tokenizers" / "gpt2") for _ in range(2))
    assert same_tokenizer(one, same) and same_tokenizer(one, one)
    assert not same_tokenizer(one, load_tokenizer(shared / "tokenizers" / "gpt-neox-20b"))
    same.chat_template = "{{ messages }}"
    assert not same_tokenizer(one, same)


def test_shaping_in_order(x64):
    """Scale, normalise, clip, then the penalty, which neither clip nor scale touches; None stays 0."""
    scores = np.array([1.0, 3.0, -10.0, 5.0])
    applies, finished = np.array([True, True, True, False]), np.array([True, False, True, False])
    statistics = merge_statistics({k: v.astype(float) for k, v in initial_statistics().items()}, 2 * scores, applies)
    got = shape_scores(scores, applies, finished, statistics, scale=2.0, clip=1.0, missing_eos_penalty=0.5)
    real = 2 * scores[:3]
    normal = np.clip((real - real.mean()) / np.sqrt(real.var() + 1e-8), -1, 1)
    np.testing.assert_allclose(got, [normal[0], normal[1] - 0.5, normal[2], 0.0], atol=1e-12)


def test_running_statistics_are_those_of_all_scores(x64):
    rng = np.random.default_rng(0)
    statistics, seen = {k: v.astype(float) for k, v in initial_statistics().items()}, []
    for size in (3, 0, 5, 1):
        scores = rng.normal(2, 3, 6)
        applies = np.arange(6) < size
        statistics = merge_statistics(statistics, scores, applies)
        seen.extend(scores[applies])
        assert float(statistics["score_count"]) == len(seen)
        np.testing.assert_allclose(statistics["score_mean"], np.mean(seen), atol=1e-12)
        np.testing.assert_allclose(statistics["score_var"], np.var(seen), atol=1e-12)
