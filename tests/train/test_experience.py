"""The collection of experience: against a Python loop, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import put_batch
from jaxalign.rewards.model import ModelScorer, padded_rows, score_rows
from jaxalign.rewards.samples import Samples
from jaxalign.train import collect
from tests.ops.test_policy_ops import gae_loop
from tests.train.ppo_world import STOP, drawn, ppo_config, prompt_batch, record, tiny_model, world


def fractional(prompts, completions, *, completion_ids, **_):
    """Scores such as 0.375 that no integer stands for."""
    return [sum(ids) / 64 for ids in completion_ids]


def by_record(batches):
    """All rows of minibatches in the order of their records, as numpy."""
    joined = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *batches)
    order = np.argsort(joined.batch.record_ids[:, 0], kind="stable")
    return jax.tree.map(lambda x: x[order], joined)


def one_epoch(**changes):
    return ppo_config(**{"algorithm.num_ppo_epochs": 1} | changes)


@pytest.fixture(scope="module")
def plain():
    """Two epochs of two minibatches of two micro-batches at T = 0.5 with early stop, and one iteration of it."""
    c = ppo_config(
        grad_accum_steps=2,
        **{
            "rollout.temperature": 0.5,
            "algorithm.num_minibatches": 2,
            "algorithm.num_ppo_epochs": 2,
            "algorithm.max_approx_kl": 1e-3,
        },
    )
    w = world(fractional, config=c, perturb=0.05, learning_rate=3e-2)
    w.collected = w.prepare(w.state, w.frozen, w.batch)
    return w


ALONE = (("data", 1), ("fsdp", 1), ("tensor", 1))


@functools.cache
def in_float64(width=5, sizes=ALONE, accumulation=1, split=None):
    """One iteration and its first update in float64 with every option on.

    Returns:
      Experience by record, samples, the parameters afterwards, metrics of the iteration and the step.
    """
    with jax.enable_x64(True):
        mesh = make_mesh(dict(sizes), jax.devices()[: int(np.prod([n for _, n in sizes]))])
        c = one_epoch(
            batch_size=32,
            grad_accum_steps=accumulation,
            **{
                "rollout.temperature": 0.7,
                "rollout.tensor": split,
                "algorithm.kl_estimator": "k3",
                "algorithm.gamma": 0.95,
                "algorithm.entropy_coef": 0.01,
                "rewards.scale": 2.0,
                "rewards.clip": 1.5,
                "rewards.missing_eos_penalty": 0.25,
                "rewards.whiten": True,
            },
        )
        w = world(
            fractional,
            config=c,
            perturb=0.05,
            dtype="float64",
            width=width,
            mesh=mesh,
            prompts=[[1, i] for i in range(32)],
        )
        with jax.set_mesh(mesh):
            state, batches, metrics, samples = jax.block_until_ready(w.prepare(w.state, w.frozen, w.batch))
            state, of_step = jax.block_until_ready(w.step(state, w.frozen, batches[0]))
        return jax.device_get((by_record(batches), samples, state.params, metrics | of_step))


def test_quantities_are_the_loop():
    """Rewards, advantages, returns from the recorded log-probs, values and scores, by Python loops, to 1e-12."""
    got, said, _, metrics = in_float64()
    mask = got.batch.readouts.mask
    assert got.advantages.dtype == np.float64
    rewards, kls = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, sample in enumerate(said):
        length = int(mask[b].sum())
        ids = got.batch.readouts.target[b, :length].tolist()
        assert sample["score"] == sum(ids) / 64 and sample["num_tokens"] == length
        for t in range(length):
            d = got.old_logprobs[b, t] - got.ref_logprobs[b, t]
            kls[b, t] = np.exp(-d) - 1 + d
            rewards[b, t] = -np.float32(0.05) * kls[b, t]
        shaped = min(max(2.0 * sample["score"], -1.5), 1.5) - (0.25 if ids[-1] not in STOP else 0.0)
        rewards[b, length - 1] += shaped
    plain_rewards = rewards.copy()
    real = rewards[mask]
    rewards[mask] = (real - real.mean()) / np.sqrt(real.var() + 1e-8) + real.mean()
    advantages, returns = gae_loop(rewards, got.old_values, mask, 0.95, 0.95)
    np.testing.assert_allclose(got.returns, returns, atol=1e-12)
    real = advantages[mask]
    advantages[mask] = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    np.testing.assert_allclose(got.advantages, advantages, atol=1e-12)
    assert np.isclose(metrics["objective/kl"], kls.sum(1).mean(), atol=1e-12)
    assert np.isclose(metrics["objective/scores"], np.mean([s["score"] for s in said]), atol=1e-7)
    assert np.isclose(metrics["objective/rlhf_reward"], plain_rewards.sum(1).mean(), atol=1e-7)
    assert np.isclose(metrics["rollout/eos_share"], np.mean([s["finished"] for s in said]))
    assert np.isclose(metrics["rollout/length_mean"], mask.sum(1).mean())


def test_trap_missing_eos_looks_at_all_stop_ids():
    """Completions that end by either stop id have ended, and only those cut off pay (the loop above says what)."""
    got, said, _, _ = in_float64()
    ends = {}
    for sample, mask, ids in zip(said, got.batch.readouts.mask, got.batch.readouts.target, strict=True):
        last = int(ids[mask][-1])
        ends[last if last in STOP else None] = sample["finished"]
    assert ends == {3: True, 5: True, None: False}


@pytest.mark.parametrize(
    "width,sizes,accumulation,split",
    [
        (9, ALONE, 4, None),
        (5, (("data", 2), ("fsdp", 2), ("tensor", 2)), 2, None),
        (5, (("data", 1), ("fsdp", 8), ("tensor", 1)), 1, 2),
    ],
    ids=["padding and accumulation", "mixed mesh", "layers split for sampling alone"],
)
def test_invariance(width, sizes, accumulation, split):
    """Padding, accumulation and devices change neither experience nor update: float64, 1e-9."""
    (one, _, params, metrics), (other, _, params2, metrics2) = (
        in_float64(),
        in_float64(width, sizes, accumulation, split),
    )
    np.testing.assert_array_equal(one.batch.readouts.target, other.batch.readouts.target)  # the same tokens
    for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9, err_msg=name)
    for name in ("loss/policy", "loss/value", "grad_norm/policy", "grad_norm/value", "policy/entropy", "objective/kl"):
        np.testing.assert_allclose(metrics[name], metrics2[name], rtol=1e-9, atol=1e-12, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), params, params2)


def test_trap_rewards_stay_fractional(plain):
    scores = [s["score"] for s in plain.collected.samples]
    assert all(s != int(s) for s in scores)
    np.testing.assert_allclose(plain.collected.metrics["objective/scores"], np.mean(scores), rtol=1e-6)


def test_trap_old_logprobs_are_the_training_forwards(plain):
    """Not the sampler's: the first update's ratio is exactly 1, and the sampler's gap is logged."""
    state, batches, metrics, _ = plain.collected
    _, of_step = plain.step(state, plain.frozen, batches[0])
    assert float(of_step["policy/approxkl"]) < 1e-12
    assert abs(float(of_step["val/ratio"]) - 1) < 1e-6
    assert 0 <= float(metrics["rollout/sampler_gap"]) < 1e-4
    assert abs(float(metrics["rollout/sampler_ratio"]) - 1) < 1e-4


def test_trap_a_sampler_that_disagrees_is_logged_and_not_trained_on(plain, monkeypatch):
    """Log-probs a tenth of a nat off, as another kernel's might be: the experience is bitwise the same."""
    sample = collect.roll_out

    def off(*args, **options):
        rollout, rest = sample(*args, **options)
        return rollout._replace(logprobs=rollout.logprobs - 0.1), rest

    monkeypatch.setattr(collect, "roll_out", off)
    _, batches, metrics, _ = plain.prepare(plain.state, plain.frozen, plain.batch)
    jax.tree.map(np.testing.assert_array_equal, batches, plain.collected.batches)
    assert abs(float(metrics["rollout/sampler_gap"]) - 0.1) < 1e-4
    assert abs(float(metrics["rollout/sampler_ratio"]) - np.exp(0.1)) < 1e-4


def test_trap_temperature(plain):
    """Identical policy and reference at T = 0.5: KL exactly 0 at every token (Tunix: 0.859)."""
    same = {"ref": plain.state.params["policy"]}
    _, batches, metrics, _ = plain.prepare(plain.state, same, plain.batch)
    assert float(metrics["objective/kl"]) == 0.0
    np.testing.assert_array_equal(batches[0].old_logprobs, batches[0].ref_logprobs)
    assert float(metrics["rollout/sampler_gap"]) < 1e-4  # the sampler's log-probs are at T = 0.5 as well
    _, of_step = plain.step(plain.state, same, batches[0])
    assert float(of_step["policy/approxkl"]) < 1e-12  # and so are the update's


def test_bitwise_function_of_state_batch_and_seed(plain):
    again = plain.prepare(plain.state, plain.frozen, plain.batch)
    for one, other in zip(jax.tree.leaves(plain.collected[:2]), jax.tree.leaves(again[:2]), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    later = plain.state._replace(data_cursor=plain.state.data_cursor + 1)
    other = plain.prepare(later, plain.frozen, plain.batch)[1]
    assert (np.asarray(other[0].batch.rows.tokens) != np.asarray(again[1][0].batch.rows.tokens)).any()


def test_minibatches_deal_every_row_once_an_epoch(plain):
    batches = plain.collected.batches
    assert len(batches) == 4
    ids = [np.asarray(b.batch.record_ids)[:, 0].tolist() for b in batches]
    assert [len(i) for i in ids] == [4] * 4
    assert sorted(ids[0] + ids[1]) == sorted(ids[2] + ids[3]) == list(range(8))
    assert ids[0] + ids[1] != ids[2] + ids[3]
    whole = [by_record(batches[i : i + 2]) for i in (0, 2)]
    jax.tree.map(np.testing.assert_array_equal, *whole)


def test_everything_compiles_once(plain):
    state = plain.state
    for _ in range(2):
        state, batches, _, _ = plain.prepare(state, plain.frozen, plain.batch)
        for batch in batches:
            state, _ = plain.step(state, plain.frozen, batch)
        jax.block_until_ready(state)
        state = state._replace(
            data_cursor=jax.device_put(np.int32(int(state.data_cursor) + 1), plain.state.step.sharding)
        )
    assert [f._cache_size() for f in (plain.step, plain.prepare.collector.forward, plain.prepare.batches)] == [1, 1, 1]


def test_evaluation_is_repeatable_and_leaves_no_trace(plain):
    asked = (plain.state, plain.frozen, plain.batch, record)
    first, second = (jax.device_get(plain.prepare.evaluate(*asked)) for _ in range(2))
    assert first == second
    total, weight = first["objective/scores"]
    assert weight == 8 and 0 < total / weight < 2
    assert first["objective/kl"][0] != 0


def test_last_batch_of_an_epoch_is_dealt_out(plain):
    """Three prompts in a batch of eight: the five empty rows teach nothing and every minibatch has a real row."""
    batch = put_batch(prompt_batch([[1, 7], [1, 8], [1, 9, 10]], 5, 8), plain.mesh)
    state, batches, metrics, samples = plain.prepare(plain.state, plain.frozen, batch)
    assert [np.asarray(b.batch.readouts.mask).any(1).sum() for b in batches] == [2, 1, 2, 1]
    assert np.isclose(metrics["objective/scores"], np.mean([s["score"] for s in samples]))
    assert len(samples) == 3
    new, of_step = plain.step(state, plain.frozen, batches[1])
    assert float(of_step["skipped"]) == 0 and np.isfinite(float(of_step["loss/policy"]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.params))


def test_completions_without_a_score_teach_nothing(plain, monkeypatch):
    def some(prompts, completions, *, completion_ids, wanted, **_):
        return [sum(ids) / 64 if w else None for ids, w in zip(completion_ids, wanted, strict=True)]

    monkeypatch.setattr(plain.prepare.collector.reward, "function", some)
    _, batches, metrics, samples = plain.prepare(plain.state, plain.frozen, plain.batch)
    got = by_record(batches[:2])
    taught = got.batch.readouts.mask.any(1)
    assert taught.tolist() == [bool(i % 2) for i in range(8)]
    assert not got.advantages[~taught].any()
    assert float(metrics["objective/scores_share"]) == 0.5
    assert [s["score"] is None for s in samples] == [i % 2 == 0 for i in range(8)]
    real = got.advantages[got.batch.readouts.mask]
    np.testing.assert_allclose([real.mean(), real.std()], [0, 1], atol=1e-4)  # whitened over those that count
    reward = plain.prepare.collector.reward
    monkeypatch.setattr(reward, "function", lambda prompts, completions, **_: [None] * len(prompts))
    with pytest.raises(InputError, match="None for every completion"):
        plain.prepare(plain.state, plain.frozen, plain.batch)


def test_early_stop_skips_what_is_left_of_an_iteration(plain):
    """Once an update's batch shows too much KL, it and the later ones change nothing but the step count."""
    state, batches, _, _ = plain.prepare(plain.state, plain.frozen, plain.batch)
    stopped = []
    for i, batch in enumerate(batches):
        before = jax.device_get((state.params, state.opt))
        state, metrics = plain.step(state, plain.frozen, batch)
        stopped.append(bool(metrics["stopped"]))
        same = jax.tree.map(np.array_equal, before, jax.device_get((state.params, state.opt)))
        assert all(jax.tree.leaves(same)) == stopped[-1], i
        assert int(state.step) == i + 1
    assert stopped == [False, True, True, True]  # the first update is on policy: its KL is 0
    state = plain.prepare(state, plain.frozen, plain.batch).state
    assert not bool(state.extra["skip"])


def test_reward_model_reads_the_policys_own_rows(plain, monkeypatch):
    """A reward model with the policy's tokenizer scores each completion as if it stood alone."""
    model = tiny_model("score")
    params = drawn(model, 3)
    monkeypatch.setattr(plain.prepare.collector, "reward", model)
    _, batches, metrics, said = plain.prepare(plain.state, plain.frozen | {"reward": params}, plain.batch)
    readouts = by_record(batches[:2]).batch.readouts
    for prompt, sample, ids, mask in zip(plain.prompts, said, readouts.target, readouts.mask, strict=True):
        alone = score_rows(model, params, *padded_rows([np.array([*prompt, *ids[mask]], np.int32)]))
        np.testing.assert_allclose(sample["score"], alone[0], atol=1e-5)
    np.testing.assert_allclose(metrics["objective/scores"], np.mean([s["score"] for s in said]), rtol=1e-5)


def test_scoring_takes_as_few_parts_as_fit(plain, monkeypatch, shared):
    """Where the memory is not known, those of the train step."""
    collector, rows, model = plain.prepare.collector, plain.batch.rows, tiny_model("score")
    for reward in (model, ModelScorer(model, load_tokenizer(shared / "tokenizers" / "minimind-6400"))):
        monkeypatch.setattr(collector, "reward", reward)
        for limit, parts in ((None, 4), (2**30, 1), (1000, 4)):
            monkeypatch.setattr(collector, "limit", limit)
            assert collector.scored_in(rows, 0) == collector.parts_of(rows, 0) == parts
        assert collector.scored_in(rows, None) == 4


def test_reward_model_with_another_tokenizer_reads_text(plain, monkeypatch, shared):
    """Decoded completions, tokenised anew; a batch that is not full is filled."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind-6400")
    model = tiny_model("score", vocab_size=6400)
    params = drawn(model, 3)
    monkeypatch.setattr(plain.prepare.collector, "reward", ModelScorer(model, tokenizer, mesh=plain.mesh))
    batch = put_batch(prompt_batch([[1, 7], [1, 8], [1, 9, 10]], 5, 8), plain.mesh)
    said = plain.prepare(plain.state, plain.frozen | {"reward": params}, batch).samples
    alone = ModelScorer(model, tokenizer, params)
    for i, sample in enumerate(said):
        assert sample["prompt"] == f"prompt {i}"
        given = Samples([sample["prompt"]], [sample["completion"]], [[]], [sample["finished"]], [record(i)], 0)
        np.testing.assert_allclose(sample["score"], alone(given)[0], atol=1e-5)
    assert len({s["score"] for s in said}) == 3


def test_adaptive_coefficient_and_running_statistics():
    """Two iterations: the coefficient of an iteration is the one it starts with; scores by all scores so far."""
    c = one_epoch(
        **{
            "algorithm.kl_target": 0.05,
            "algorithm.kl_horizon": 80,
            "rewards.normalize": True,
            "rewards.clip": 1.0,
        }
    )
    c.algorithm.gae_lambda = 1.0
    c.algorithm.whiten_advantages = False
    w = world(fractional, config=c, perturb=0.1)
    state, coef, seen = w.state, 0.05, []
    for _ in range(2):
        state, batches, metrics, samples = w.prepare(state, w.frozen, w.batch)
        np.testing.assert_allclose(metrics["objective/kl_coef"], coef, rtol=1e-6)
        scores = np.array([s["score"] for s in samples])
        seen.extend(scores)
        shaped = np.clip((scores - np.mean(seen)) / np.sqrt(np.var(seen) + 1e-8), -1, 1)
        got = by_record(batches)
        kl = np.where(got.batch.readouts.mask, got.old_logprobs - got.ref_logprobs, 0).sum(1)
        np.testing.assert_allclose(got.returns[:, 0], shaped - coef * kl, atol=1e-4)  # gamma = lambda = 1
        error = np.clip(float(metrics["objective/kl"]) / 0.05 - 1, -0.2, 0.2)
        coef *= 1 + error * 8 / 80
        np.testing.assert_allclose(state.extra["kl_coef"], coef, rtol=1e-6)
        state = state._replace(data_cursor=jax.device_put(np.int32(1), state.data_cursor.sharding))
    np.testing.assert_allclose(state.extra["score_mean"], np.mean(seen), rtol=1e-5)
    np.testing.assert_allclose(state.extra["score_var"], np.var(seen), rtol=1e-4)
    assert float(state.extra["score_count"]) == 16


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="a multiple of 12") as error:
        world(fractional, config=ppo_config(grad_accum_steps=4, **{"algorithm.num_minibatches": 3}))
    assert "--config.batch_size=12" in str(error.value)


def test_reward_rises():
    """PPO on a tiny random model, asked for tokens of the upper half: from about 0.26 to above 0.5."""

    def upper(prompts, completions, *, completion_ids, **_):
        return [sum(t >= 16 for t in ids) / len(ids) for ids in completion_ids]

    c = ppo_config(batch_size=32, **{"algorithm.num_minibatches": 2})
    w = world(upper, config=c, prompts=[[1, i] for i in range(32)], learning_rate=5e-3)
    state, scores, kls = w.state, [], []
    for iteration in range(20):
        state, batches, metrics, _ = w.prepare(state, w.frozen, w.batch)
        for batch in batches:
            state, _ = w.step(state, w.frozen, batch)
        cursor = jax.device_put(jnp.int32(iteration + 1), state.data_cursor.sharding)
        state = jax.block_until_ready(state._replace(data_cursor=cursor))
        scores.append(float(metrics["objective/scores"]))
        kls.append(float(metrics["objective/kl"]))
    assert np.mean(scores[:2]) < 0.35
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.25, scores
    assert kls[0] == 0.0 and kls[-1] > 0.5
