"""Several completions of a prompt: as if each stood alone, in rows, rewards, minibatches and updates."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.parallel.mesh import make_mesh
from jaxalign.rollout.continuous import roll_out
from jaxalign.rollout.sampling import Sampling
from jaxalign.train.minibatches import shuffle_minibatches
from jaxalign.train.rundir import RunDir
from jaxalign.train.samples import Sampler
from tests.train.ppo_world import STOP, drawn, ppo_config, prompt_batch, tiny_model, world
from tests.train.test_experience import fractional

PROMPTS = [[1, 7, 9], [1, 8], [1, 9, 10, 11], [1, 12]]
FIELDS = {
    "rollout.temperature": 0.7,
    "rewards.whiten": True,
    "rewards.missing_eos_penalty": 0.25,
    "algorithm.kl_estimator": "k3",
    "algorithm.entropy_coef": 0.01,
    "algorithm.num_ppo_epochs": 1,
}


def by_completion(batch):
    """[(prompt's tokens, completion's tokens, {field: its values})] of a PolicyBatch, by plain loops, sorted."""
    found = []
    b = jax.device_get(batch)
    readouts = b.batch.readouts
    for row in range(len(readouts.mask)):
        for number in range(b.batch.completions.mask.shape[1]):
            here = readouts.mask[row] & (readouts.completion[row] == number)
            if here.any():
                said = readouts.target[row][here].tolist()
                fields = {name: getattr(b, name)[row][here] for name in b._fields[1:]}
                found.append((int(b.batch.record_ids[row, number]), said, fields))
    return sorted(found, key=lambda x: x[:2])


@functools.cache
def iteration(num_samples, sizes=(("data", 1), ("fsdp", 1), ("tensor", 1))):
    """One iteration in float64: experience, samples, metrics, and what a reward model says of the completions."""
    with jax.enable_x64(True):
        mesh = make_mesh(dict(sizes), jax.devices()[: int(np.prod([n for _, n in sizes]))])
        c = ppo_config(batch_size=8 // num_samples, **FIELDS | {"rollout.num_samples": num_samples})
        prompts = [p for p in PROMPTS for _ in range(2 // num_samples)]
        w = world(fractional, config=c, perturb=0.05, dtype="float64", prompts=prompts, mesh=mesh)
        with jax.set_mesh(mesh):
            _, batches, metrics, lines = jax.block_until_ready(w.prepare(w.state, w.frozen, w.batch))
            model = tiny_model("score", dtype="float64")
            w.prepare.collector.reward = model
            frozen = w.frozen | {"reward": jax.tree.map(jnp.asarray, drawn(model, 3))}
            collected, _, _ = w.prepare.collector.collect(w.state.params, frozen, w.batch, w.state.data_cursor, 0)
            scores = collected.scores.values[:, 0]
        return jax.device_get((by_completion(batches[0]), lines, metrics, scores))


def test_two_completions_are_those_of_the_prompt_written_twice():
    """Experience, metrics, a reward model's scores: float64, 1e-9.

    Number s of prompt i has the key of record 2 i + s.
    """
    (one, lines, metrics, scores), (other, lines2, metrics2, scores2) = iteration(2), iteration(1)
    assert len(one) == len(other) == 8
    for (record, said, fields), (record2, said2, fields2) in zip(
        one, sorted(other, key=lambda x: (x[0] // 2, x[1])), strict=True
    ):
        assert (record, said) == (record2 // 2, said2)
        for name in fields:
            np.testing.assert_allclose(fields[name], fields2[name], rtol=0, atol=1e-9, err_msg=name)
    assert len({tuple(said) for _, said, _ in one}) > 6
    assert [(x["completion"], x["score"]) for x in lines] == [(x["completion"], x["score"]) for x in lines2]
    assert [x["prompt"] for x in lines[:4]] == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    np.testing.assert_allclose(scores, scores2, rtol=0, atol=1e-9)
    assert np.ptp(scores) > 0.1
    counted = {"processed_tokens", "time/prefill", "time/decode", "time/scoring"}
    assert set(metrics) == set(metrics2)
    for name in set(metrics) - counted:
        np.testing.assert_allclose(metrics[name], metrics2[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert metrics2["processed_tokens"] - metrics["processed_tokens"] == sum(map(len, PROMPTS))  # read once


def test_samples_are_all_completions_of_the_first_prompts(tmp_path):
    config = ppo_config(**{"rollout.num_samples": 3})
    config.logging.num_samples = 2
    made = [{"prompt": i // 3, "completion": i} for i in range(12)]
    Sampler(SimpleNamespace(config=config, directory=RunDir(str(tmp_path))))(None, {}, 5, made)
    written = [json.loads(line) for line in (tmp_path / "samples" / "5.jsonl").read_text().splitlines()]
    assert written == [{"step": 5, **line} for line in made[:6]]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_keys_are_by_prompt_and_number(num_samples):
    """A prompt alone, each completion by itself, says the same; one completion has its record's own key."""
    w = world(fractional, config=ppo_config(batch_size=4, **{"rollout.num_samples": num_samples}), prompts=PROMPTS)
    asked, ids = w.prepare.collector.ask(w.batch)
    assert ids.tolist() == list(range(4 * num_samples))
    assert asked.record_ids[:, 0].tolist() == [i // num_samples for i in range(4 * num_samples)]
    if num_samples == 1:  # the numbers that `generate` is asked for, as they ever were
        return
    model = tiny_model()
    params = jax.tree.map(jnp.asarray, drawn(model))
    options = {"sampling": Sampling(0.8, 6), "stop_ids": STOP}
    together, _ = roll_out(model, params, prompt_batch(PROMPTS, 5).rows, jax.random.key(3), ids, **options)
    for i, number in ((0, 0), (2, num_samples - 1)):
        at = i * num_samples + number
        rows = prompt_batch([PROMPTS[i]], 5, rows=4).rows
        one = np.full(4 * num_samples, -1, np.int32)
        one[0] = at
        alone, _ = roll_out(model, params, rows, jax.random.key(3), one, **options)
        np.testing.assert_array_equal(together.tokens[at], alone.tokens[0])
    assert len({tuple(t) for t in np.asarray(together.tokens).tolist()}) > 2 * num_samples


def test_completions_of_a_prompt_stay_in_one_minibatch():
    used = jnp.arange(8) < 5
    plain = shuffle_minibatches(jax.random.key(1), used, 4)
    whole = shuffle_minibatches(jax.random.key(1), used, 4, 3)
    for rows, prompts in zip(whole, plain, strict=True):
        assert rows.tolist() == [3 * p + s for p in prompts.tolist() for s in range(3)]
        assert used[prompts].any()
