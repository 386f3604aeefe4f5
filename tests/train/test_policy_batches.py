"""From what was collected to batches: estimators without a critic, parts of scores, tokens that were not sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.errors import InputError
from jaxalign.ops.kl import last_real
from jaxalign.parallel.sharding import put_batch
from jaxalign.rewards.scores import combine, score_arrays, totals
from jaxalign.rollout.completed import Rollout, completed_rows
from jaxalign.rollout.pairs import paired_rows
from jaxalign.rollout.slots import repeat_rows
from jaxalign.steps.policy import policy_objective
from jaxalign.steps.step import make_train_step
from jaxalign.train import collect
from jaxalign.train.collect import Collector
from jaxalign.train.experience import make_prepare
from tests.train.ppo_world import STOP, NumberTokenizer, ppo_config, prompt_batch, record, world
from tests.train.test_experience import fractional
from tests.train.test_num_samples import by_completion

PROMPTS = [[1, 7, 9], [1, 8], [1, 9, 10, 11], [1, 12]]


def leave_one_out(rewards, mask, *, values=None, group=None):
    """Each completion's summed reward less the mean of the others' of its prompt, at each of its tokens."""
    assert values is None
    total = jnp.sum(jnp.where(mask, rewards, 0), axis=1)
    same = (group[:, None] == group[None]) & jnp.any(mask, axis=1)[None] & ~jnp.eye(len(group), dtype=bool)
    others = jnp.sum(jnp.where(same, total, 0), axis=1) / jnp.maximum(jnp.sum(same, axis=1), 1)
    return jnp.where(mask, (total - others)[:, None], 0), None


def prepare_of(w, config, **changes):
    reward = changes.pop("reward", w.prepare.collector.reward)
    options = {"policy": w.policy, "value": w.value, "reward": reward, "records": record, "mesh": w.mesh}
    return make_prepare(config, **options | {"tokenizer": NumberTokenizer(), "stop_ids": STOP} | changes)


@pytest.fixture(scope="module")
def config():
    changes = {"rollout.num_samples": 2, "algorithm.num_ppo_epochs": 1, "algorithm.num_minibatches": 2}
    return ppo_config(batch_size=4, **changes | {"algorithm.whiten_advantages": False, "rollout.temperature": 0.7})


@pytest.fixture(scope="module")
def small(config):
    return world(fractional, config=config, prompts=PROMPTS, perturb=0.05)


def test_an_estimator_without_a_critic(small, config):
    """No value model anywhere: collection, batches, the objective and its gradient; advantages by a loop."""
    prepare = prepare_of(small, config, value=None, estimator=leave_one_out)
    state = small.state._replace(params={"policy": small.state.params["policy"]})
    _, batches, metrics, _ = prepare(state, small.frozen, small.batch)
    assert "val/explained_variance" not in metrics and "objective/scores" in metrics
    joined = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *batches)
    assert joined.old_values is None and joined.returns is None
    said = [
        (r, ids, f)
        for r, ids, f in by_completion(joined._replace(old_values=joined.advantages, returns=joined.advantages))
    ]
    found = {}
    for i, (prompt, ids, fields) in enumerate(said):
        kl = fields["old_logprobs"] - fields["ref_logprobs"]
        found.setdefault(prompt, []).append((i, sum(ids) / 64 - 0.05 * kl.sum()))
    for pair in found.values():
        (a, first), (b, second) = pair
        np.testing.assert_allclose(said[a][2]["advantages"], first - second, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(said[b][2]["advantages"], second - first, rtol=1e-4, atol=1e-5)
    settings = {"temperature": 0.7, "clip_range": 0.2, "value_clip_range": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0}
    objective = policy_objective(small.policy.apply, small.policy.head, None, None, **settings)
    optimizer = optax.sgd(1e-2)
    state = state._replace(opt={"policy": optimizer.init(state.params["policy"])})
    new, of_step = jax.jit(make_train_step(objective, {"policy": optimizer}))(state, small.frozen, batches[0])
    assert np.isfinite(float(of_step["loss"])) and "loss/value" not in of_step
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), new.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0


class Parts:
    """Two parts: one of whole completions, that does not apply to every third; one of tokens."""

    def __call__(self, samples):
        whole = [None if i % 3 == 0 else sum(ids) / 64 for i, ids in enumerate(samples.completion_ids)]
        return {"whole": whole, "tokens": [[t / 32 for t in ids] for ids in samples.completion_ids]}


def test_parts_and_scores_of_tokens_are_the_loop(small, config):
    """Rewards from two weighted parts, one per token, by a loop: returns with gamma = lambda = 1 say what came in."""
    c = config.copy_and_resolve_references()
    c.algorithm.gae_lambda = 1.0
    c.rewards.scale = 2.0
    prepare, reward = prepare_of(small, c), Parts()
    options = {"policy": small.policy, "value": small.value, "records": record, "tokenizer": NumberTokenizer()}
    weights = {"tokens": 0.5}
    prepare.collector = Collector(c, **options, reward=reward, stop_ids=STOP, mesh=small.mesh, weights=weights)
    _, batches, metrics, samples = prepare(small.state, small.frozen, small.batch)
    joined = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *batches)
    lines = {tuple(map(int, x["completion"].split())) + (x["prompt"],): x for x in samples}
    for prompt, ids, fields in by_completion(joined):
        kl = fields["old_logprobs"] - fields["ref_logprobs"]
        line = lines[(*(i for i in ids if i not in STOP), f"prompt {prompt}")]
        whole = line["scores"]["whole"]
        rewards = [2.0 * 0.5 * t / 32 - 0.05 * k for t, k in zip(ids, kl, strict=True)]
        rewards[-1] += 2.0 * (whole or 0.0)
        for t in range(len(ids)):
            assert fields["returns"][t] == pytest.approx(sum(rewards[t:]), abs=1e-4)
        assert line["score"] == pytest.approx((whole or 0.0) + 0.5 * sum(ids) / 32, abs=1e-6)
    assert float(metrics["objective/scores"]) == pytest.approx(np.mean([x["score"] for x in samples]), rel=1e-5)


def test_parts_as_arrays():
    parts = {"a": [1.0, None, 3.0], "b": [[1.0, 2.0], None, None]}
    used, present = np.array([True, False, True, True]), np.arange(3) < np.array([2, 0, 1, 3])[:, None]
    scores = score_arrays(parts, {"b": 0.5}, used, present)
    assert scores.names == ("a", "b") and scores.weights == (1.0, 0.5)
    assert scores.applies.tolist() == [[True, True], [False, False], [False, False], [True, False]]
    whole, applies, of_tokens = combine(scores)
    assert whole.tolist() == [1, 0, 0, 3] and applies.tolist() == [True, False, False, True]
    assert of_tokens.tolist() == [[0.5, 1, 0], [0] * 3, [0] * 3, [0] * 3]
    assert totals(parts, {"b": 0.5}) == [2.5, None, 3.0]
    alone = combine(score_arrays({"score": [0.1, 0.2, None]}, {}, used, present))
    assert alone[0].tolist() == [np.float32(0.1), 0, np.float32(0.2), 0] and alone[2] is None
    with pytest.raises(InputError, match="3 tokens of a completion of 2"):
        score_arrays({"b": [[1.0, 2.0, 3.0], None, None]}, {}, used, present)


def with_tool(rollout):
    """The same, its second and third tokens written by a tool."""
    place = np.arange(rollout.tokens.shape[1])
    return rollout._replace(sampled=rollout.sampled & ((place < 1) | (place > 2)))


@pytest.mark.parametrize("together", [1, 2])
def test_unsampled_tokens_are_seen_and_not_read_out(together):
    """Rows are the same whoever wrote a token; readouts are of sampled ones alone."""
    batch = repeat_rows(prompt_batch(PROMPTS, 5), 2)
    mask = np.arange(6) < np.array([6, 4, 3, 6, 5, 1, 2, 6])[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(6, 32, mask.shape), 0).astype(np.int32)
    plain = Rollout(tokens, mask, mask, 0.0 * mask, mask[:, 5])
    lay = paired_rows if together == 2 else completed_rows
    (rows, readouts), (same, fewer) = lay(batch.rows, plain), lay(batch.rows, with_tool(plain))
    jax.tree.map(np.testing.assert_array_equal, rows, same)
    wanted = np.asarray(with_tool(plain).sampled).reshape(8 // together, -1)
    np.testing.assert_array_equal(fewer.mask, wanted)
    assert np.asarray(readouts.mask).sum() > wanted.sum()
    np.testing.assert_array_equal(np.asarray(fewer.source)[wanted], np.asarray(readouts.source)[wanted])


def test_unsampled_tokens_are_not_trained_on(small, config, monkeypatch):
    """A tool's tokens change what is attended to and read by the reward; no log-prob, KL, loss is of them."""
    sample = collect.roll_out

    def off(*args, **options):
        rollout, figures = sample(*args, **options)
        return put_batch(jax.tree.map(np.asarray, with_tool(rollout)), small.mesh), figures

    _, plain, _, lines = small.prepare(small.state, small.frozen, small.batch)
    monkeypatch.setattr(collect, "roll_out", off)
    _, batches, metrics, samples = small.prepare(small.state, small.frozen, small.batch)
    assert [x["completion"] for x in samples] == [x["completion"] for x in lines]  # read whole
    for one, other in zip(plain, batches, strict=True):
        np.testing.assert_array_equal(one.batch.rows.tokens, other.batch.rows.tokens)
        trained, before = np.asarray(other.batch.readouts.mask), np.asarray(one.batch.readouts.mask)
        assert trained.sum() < before.sum() and not (trained & ~before).any()
        np.testing.assert_allclose(other.old_logprobs[trained], one.old_logprobs[trained], atol=1e-5)
        assert not np.asarray(other.advantages)[~trained].any() and not np.asarray(other.old_logprobs)[~trained].any()
        assert float(small.objective.weights(other)["policy"]) == trained.sum()
    assert last_real(with_tool(Rollout(*[np.ones((1, 3), bool)] * 5)).sampled).tolist() == [[True, False, False]]
    assert float(metrics["rollout/length_mean"]) < 6


def test_fewer_slots_collect_the_same(small, config):
    """Slots that are refilled: bitwise the same tokens, experience to rounding."""
    c = config.copy_and_resolve_references()
    c.rollout.num_slots = 3
    (_, plain, *_), (_, refilled, *_) = (
        prepare(small.state, small.frozen, small.batch) for prepare in (small.prepare, prepare_of(small, c))
    )
    for one, other in zip(plain, refilled, strict=True):
        np.testing.assert_array_equal(one.batch.rows.tokens, other.batch.rows.tokens)
        np.testing.assert_allclose(one.old_logprobs, other.old_logprobs, atol=1e-5)
