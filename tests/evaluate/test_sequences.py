import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.evaluate import sequences as module
from jaxalign.evaluate.sequences import Tokens, completion_logprobs, final_scores
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.parallel.mesh import make_mesh
from jaxalign.types import Rows

HF = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:2])


def make(head):
    """A model with random parameters, made on the host: nothing to compile."""
    model = Model(from_hf(HF, dtype="float32", param_dtype="float32", remat="none", head=head))
    random = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), model.abstract())


@pytest.fixture(scope="module")
def policy():
    return make("lm")


@pytest.fixture(scope="module")
def reward():
    return make("score")


def causal(n):
    i = np.arange(n, dtype=np.int32)[None]
    return i, np.zeros_like(i), i + 1


def by_hand(model, params, prompt, completion):
    """One sequence alone, without padding, all logits in float64."""
    ids = np.array([[*prompt, *completion]], np.int32)
    hidden, _, _ = model.apply(params, Rows(ids, *causal(ids.shape[1])))
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(model.head(params), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logp[len(prompt) - 1 + k, t] for k, t in enumerate(completion))


def ragged(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        Tokens(
            random.integers(0, 61, random.integers(1, 40)).tolist(),
            random.integers(0, 61, random.integers(0, 30)).tolist(),
        )
        for _ in range(count)
    ]


def test_logprobs_equal_a_pass_over_each_sequence_alone(policy, mesh):
    sequences = ragged(13)
    ours = completion_logprobs(*policy, sequences, mesh)
    np.testing.assert_allclose(ours[:2], [by_hand(*policy, *s[:2]) for s in sequences[:2]], rtol=1e-5, atol=1e-5)


def test_order_is_kept_and_neighbours_do_not_matter(policy, mesh):
    sequences = ragged(13)
    ours = completion_logprobs(*policy, sequences, mesh)
    backwards = completion_logprobs(*policy, sequences[::-1], mesh)
    np.testing.assert_allclose(ours, backwards[::-1], rtol=1e-6, atol=1e-6)


def test_trap_pad_id_never_decides_what_is_padding(policy, mesh):
    """Token 0 pads the rows here; as a real token it counts like any other."""
    real = Tokens([0, 5, 0], [0, 0, 7, 0])
    np.testing.assert_allclose(completion_logprobs(*policy, [real], mesh)[0], by_hand(*policy, *real[:2]), rtol=1e-5)


def test_trap_a_score_is_read_at_the_last_real_token(reward, mesh):
    model, params = reward
    sequences = [*ragged(4, seed=3), Tokens([3, 0], [0, 0])]
    ours = final_scores(model, params, sequences, mesh)
    for k in (0, 4):
        ids = np.array([[*sequences[k].prompt, *sequences[k].completion]], np.int32)
        hidden, _, _ = model.apply(params, Rows(ids, *causal(ids.shape[1])))
        expected = float((np.asarray(hidden[0, -1], np.float64) @ np.asarray(params["score"]["kernel"], np.float64))[0])
        assert math.isclose(ours[k], expected, rel_tol=1e-5, abs_tol=1e-6)


def test_only_scored_tokens_count(policy, mesh):
    """A user's turn inside a dialogue is context: it is seen, not scored."""
    prompt, completion = [3, 4], [5, 6, 7, 8]
    ours = completion_logprobs(*policy, [Tokens(prompt, completion, [False, False, True, True])], mesh)[0]
    np.testing.assert_allclose(ours, by_hand(*policy, [3, 4, 5, 6], [7, 8]), rtol=1e-5)


def test_nothing_to_score(policy, mesh):
    assert completion_logprobs(*policy, [], mesh) == []
    assert completion_logprobs(*policy, [Tokens([3], [])], mesh) == [0.0]
    with pytest.raises(ValueError, match="sequence 1 has a prompt without tokens"):
        completion_logprobs(*policy, [Tokens([3], [1]), Tokens([], [1])], mesh)


def test_few_shapes(policy, mesh):
    traced = []

    class Traced:
        """A model that notes the shapes for which it is compiled."""

        head = policy[0].head

        def apply(self, params, rows, cache=None, **options):
            traced.append(rows.tokens.shape)
            return policy[0].apply(params, rows, cache, **options)

        def for_length(self, longest):
            return self

    completion_logprobs(Traced(), policy[1], ragged(500, seed=1), mesh)
    assert len(traced) == 3  # widths 32, 64 and 128


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70)), max_size=40), st.sampled_from([64, 1024]))
def test_every_token_is_read_once(lengths, budget):
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    random = np.random.default_rng(0)
    sequences = [Tokens(random.integers(0, 61, p).tolist(), random.integers(0, 61, c).tolist()) for p, c in lengths]
    seen: dict[int, list[int]] = {}
    before, module.TOKENS_PER_BATCH = module.TOKENS_PER_BATCH, budget
    try:
        for numbers, rows, readouts in module._batches(sequences, mesh, whole=True):
            assert rows.tokens.shape[0] % 8 == 0 and len(numbers) <= rows.tokens.shape[0]
            assert (rows.attend_end > rows.attend_start).all()  # padding sees itself
            for number, row_mask, target, source, tokens in zip(
                numbers, readouts.mask, readouts.target, readouts.source, rows.tokens, strict=False
            ):
                assert number not in seen
                seen[number] = target[row_mask].tolist()
                assert (tokens[source[row_mask] + 1] == target[row_mask]).all()
            assert not readouts.mask[len(numbers) :].any()
    finally:
        module.TOKENS_PER_BATCH = before
    assert seen == {i: list(s.completion) for i, s in enumerate(sequences)}


def test_bfloat16_still_sums_in_float32(policy, mesh):
    model, params = policy
    half = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    sequences = [s for s in ragged(20) if len(s.prompt) + len(s.completion) <= 32]
    exact, rough = (
        completion_logprobs(model, params, sequences, mesh),
        completion_logprobs(half, params, sequences, mesh),
    )
    np.testing.assert_allclose(rough, exact, rtol=0.05, atol=0.2)
