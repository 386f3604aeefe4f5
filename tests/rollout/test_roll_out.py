"""Generation: invariances of sampled tokens, stops, log-probs, meshes, and greedy decoding against stored tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.promises import check_layout
from jaxalign.models.transformer import Model
from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.logits import Head
from jaxalign.ops.readout import token_logprobs
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, put_batch
from jaxalign.rollout.completed import completed_rows
from jaxalign.rollout.continuous import roll_out
from jaxalign.rollout.sampling import Sampling
from tests.rollout.greedy_cases import MODELS, golden, ours
from tests.train.ppo_world import STOP, prompt_batch

PROMPTS = [[1, 7, 9], [1, 8], [1, 9, 10, 11], [1, 12, 13, 4]]
SAMPLING = Sampling(0.8, 9)
OPTIONS = {"sampling": SAMPLING, "stop_ids": STOP}


def run(policy, prompts, ids, width=5, rows=None, mesh=None, **options):
    model, params = policy
    batch = prompt_batch(prompts, width, rows)
    ids = np.asarray([*ids, *[-1] * (len(batch.record_ids) - len(ids))], np.int32)
    options = OPTIONS | options
    if mesh is None:
        return roll_out(model, params, batch.rows, jax.random.key(3), ids, **options)[0]
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(mesh, params))
        rows, ids = put_batch((batch.rows, ids), mesh)
        return roll_out(model, params, rows, jax.random.key(3), ids, mesh=mesh, **options)[0]


def test_tokens_do_not_depend_on_slot_batch_or_padding(policy):
    whole = run(policy, PROMPTS, [10, 11, 12, 13])
    order = [2, 0, 3, 1]
    shuffled = run(policy, [PROMPTS[i] for i in order], [10 + i for i in order])
    np.testing.assert_array_equal(whole.tokens[jnp.array(order)], shuffled.tokens)
    wide = run(policy, PROMPTS[1:2], [11], width=8)
    np.testing.assert_array_equal(whole.tokens[1:2], wide.tokens)
    longer = run(policy, PROMPTS, [10, 11, 12, 13], sampling=SAMPLING._replace(max_new_tokens=12))
    cut = np.asarray(whole.present)
    np.testing.assert_array_equal(np.asarray(longer.tokens)[:, :9][cut], np.asarray(whole.tokens)[cut])
    other = run(policy, PROMPTS, [20, 21, 22, 23])
    assert (np.asarray(other.tokens) != np.asarray(whole.tokens)).any(axis=1).all()


def test_padding_id_does_not_matter(policy):
    model, params = policy
    runs = [
        roll_out(model, params, prompt_batch(PROMPTS, 6, pad=pad).rows, jax.random.key(3), np.arange(4), **OPTIONS)[0]
        for pad in (0, 3)  # 3 is a stop token
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert np.asarray(runs[0].sampled).any()


def test_same_prompt_twice_gives_two_samples(policy):
    out = run(policy, [PROMPTS[0]] * 4, [0, 1, 2, 3])
    assert len({tuple(t) for t in np.asarray(out.tokens).tolist()}) > 1


def test_rows_end_at_any_stop_and_the_loop_with_them(policy):
    out = jax.tree.map(np.asarray, run(policy, PROMPTS * 4, range(16), sampling=SAMPLING._replace(max_new_tokens=24)))
    ends = set()
    for tokens, mask, finished in zip(out.tokens, out.present, out.finished, strict=True):
        said = tokens[mask].tolist()
        assert mask[: len(said)].all() and not mask[len(said) :].any()
        assert not set(said[:-1]) & set(STOP)
        assert finished == (said[-1] in STOP)
        assert finished or len(said) == 24
        assert not tokens[~mask].any()
        ends.add(said[-1])
    assert ends >= set(STOP)


def test_unused_rows_stay_empty_and_hold_nothing_up(policy):
    out = run(policy, PROMPTS[:2], [10, 11], rows=4)
    assert not out.present[2:].any() and not out.finished[2:].any() and not out.tokens[2:].any()
    np.testing.assert_array_equal(out.tokens[:2], run(policy, PROMPTS, [10, 11, 12, 13]).tokens[:2])


@pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (0.5, 4), (0.0, 0)])
def test_logprobs_are_those_of_the_training_forward(policy, temperature, top_k):
    """At the sampling temperature (1 for greedy), top-k left out, from rows that training reads."""
    model, params = policy
    batch = prompt_batch(PROMPTS, 5)
    out = run(policy, PROMPTS, [0, 1, 2, 3], sampling=Sampling(temperature, 9, top_k))
    rows, readouts = completed_rows(batch.rows, out)
    hidden, _, _ = model.apply(params, rows)
    logprobs, _ = token_logprobs(hidden, model.head(params), readouts, temperature=temperature or 1.0)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=2e-5)


def test_completed_rows_are_prompt_and_completion(policy):
    batch = prompt_batch(PROMPTS, 5)
    out = run(policy, PROMPTS, [0, 1, 2, 3])
    rows, readouts = jax.tree.map(np.asarray, completed_rows(batch.rows, out))
    check_layout(rows)
    for b, prompt in enumerate(PROMPTS):
        said = np.asarray(out.tokens)[b][np.asarray(out.present)[b]].tolist()
        first, end = 5 - len(prompt), 5 + len(said)
        assert rows.tokens[b, first:end].tolist() == prompt + said
        assert rows.positions[b, first:end].tolist() == list(range(len(prompt) + len(said)))
        assert (rows.attend_start[b, first:end] == first).all()
        assert (rows.attend_end[b] == np.arange(14) + 1).all()
        assert rows.attend_start[b, end:].tolist() == list(range(end, 14))  # padding sees itself
        assert rows.tokens[b][readouts.source[b][readouts.mask[b]] + 1].tolist() == said
        assert readouts.target[b][readouts.mask[b]].tolist() == said


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 2, "tensor": 4}])
def test_same_tokens_on_eight_devices(policy, sizes):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices())
    one = run(policy, PROMPTS * 2, range(8))
    many = jax.block_until_ready(run(policy, PROMPTS * 2, range(8), mesh=mesh))
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_array_equal(one.finished, many.finished)
    np.testing.assert_allclose(one.logprobs, many.logprobs, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_stored(shared, name):
    """The tokens that `transformers.generate` gave (tests/oracle/test_generate_greedy.py)."""
    got = ours(shared, name)
    assert [c.ids for c in got] == golden(name)
    assert got[0].text.startswith(", there was a")
    assert got[2].text.startswith(" was")  # prompt + text is the whole text


def test_a_capped_head_is_capped_in_decoding_too(policy, monkeypatch):
    """The sampler and the readout make logits by one function."""
    model, params = policy
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=2e-5))  # compiled anew
    plain = Model.head
    monkeypatch.setattr(Model, "head", lambda self, params: Head(plain(self, params), Scores(0.5, softcap=1.5)))
    batch = prompt_batch(PROMPTS, 5)
    out = run((model, params), PROMPTS, [0, 1, 2, 3], sampling=Sampling(0.7, 9))
    rows, readouts = completed_rows(batch.rows, out)
    hidden = model.apply(params, rows)[0]
    capped, uncapped = (
        token_logprobs(hidden, head, readouts, temperature=0.7)[0]
        for head in (model.head(params), plain(model, params))
    )
    np.testing.assert_allclose(out.logprobs, capped, atol=2e-5)
    assert np.abs(capped - uncapped).max() > 0.1
