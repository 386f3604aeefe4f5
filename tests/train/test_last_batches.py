"""A PPO run to its end: a last batch that nearly nothing is learned from, and an evaluation on other records."""

import json

import jax
import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import put_batch
from jaxalign.train import trainer
from tests.train.ppo_world import ppo_config, prompt_batch, world

REWARD = """
import json

def reward(prompts, completions, *, records, completion_ids, finished, step, **columns):
    assert prompts == [r.prompt for r in records]
    with open({log!r}, "a") as file:
        for i, prompt in enumerate(prompts):
            print(json.dumps([step, prompt, {{name: column[i] for name, column in columns.items()}}]), file=file)
    return [None if "nothing" in p else len(c) / 8 for p, c in zip(prompts, completions)]
"""


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (str(path),)


def run(shared, folder, prompts, held_out=None, **fields):
    """A run on the smallest real model; returns its results, rows of metrics, and what the reward was asked."""
    folder.mkdir(exist_ok=True)
    log = folder / "asked.jsonl"
    (folder / "mine.py").write_text(REWARD.format(log=str(log)))
    c = defaults("ppo")
    c.workdir, c.model.path = str(folder / "run"), str(shared / "models" / "stories260k-llama")
    c.data.sources, c.data.shuffle, c.data.max_length = write(folder / "train.jsonl", prompts), False, 64
    c.model.remat = "none"
    if held_out:
        c.data.eval_sources = write(folder / "eval.jsonl", held_out)
    c.batch_size, c.rollout.max_new_tokens, c.num_epochs = 4, 4, 1
    c.algorithm.num_ppo_epochs, c.algorithm.num_minibatches, c.optimizer.learning_rate = 1, 2, 1e-3
    c.rewards.function = f"{folder / 'mine.py'}:reward"
    c.logging.trackers, c.logging.progress = (), False
    c.logging.samples_every = 1
    for name, value in fields.items():
        section, leaf = name.split("__")
        c[section][leaf] = value
    results = trainer.run(c, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return results, rows, [json.loads(line) for line in log.read_text().splitlines()]


def test_a_run_with_a_last_batch_of_one_prompt_and_a_larger_evaluation(shared, tmp_path):
    """Five prompts in batches of four, the fifth without a score; eleven held out, with a column of their own."""
    train = [{"prompt": f"Once, dog {i}", "dog": i} for i in range(4)] + [{"prompt": "nothing at all", "dog": 4}]
    held_out = [{"prompt": f"The cat {i} was", "cat": i} for i in range(11)]
    results, rows, asked = run(shared, tmp_path, train, held_out)
    assert [r["step"] for r in rows if "loss/policy" in r] == [1], "nothing was learned at step 2, so it has no loss"
    last = next(r for r in rows if r["step"] == 2 and "objective/kl" in r)
    assert last["weight/policy"] == 0 and last["skipped"] == 0 and last["objective/scores_share"] == 0
    assert not {"objective/scores", "policy/approxkl", "val/explained_variance"} & last.keys()
    # each set was asked about with its own prompts and columns
    evaluated = [x for x in asked if "cat" in x[1]]
    assert [x[1:] for x in evaluated] == [[r["prompt"], {"cat": r["cat"]}] for r in held_out]
    assert [x[1:] for x in asked if x not in evaluated] == [[r["prompt"], {"dog": r["dog"]}] for r in train]
    assert results["eval"]["eval/objective/scores"] > 0
    for step, prompts in ((1, train[:4]), (2, train[4:])):  # the evaluation at the end leaves the samples alone
        lines = (tmp_path / "run" / "samples" / f"{step}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == [r["prompt"] for r in prompts]


def test_a_whole_batch_without_weight_is_an_error_of_the_data(shared, tmp_path):
    weightless = [{"prompt": f"dog {i}", "w": 0.0} for i in range(4)]
    (tmp_path / "weightless").mkdir()
    source = {"path": write(tmp_path / "weightless" / "w.jsonl", weightless)[0], "columns": {"weight": "w"}}
    with pytest.raises(InputError, match="nothing can be learned") as error:
        run(shared, tmp_path / "weightless", weightless, data__sources=(source,))
    assert "weight" in error.value.expected and "template" not in str(error.value)


def some(wanted):
    """A reward that speaks of these records alone."""

    def reward(prompts, completions, *, records, completion_ids, **_):
        return [sum(ids) / 64 if r.index in wanted else None for r, ids in zip(records, completion_ids, strict=True)]

    return reward


def snapshot(state):
    return jax.device_get((state.params, state.opt))


@pytest.mark.parametrize("shape", ["eight devices", "two samples, accumulated"])
def test_minibatches_without_a_score_are_skipped_updates(shape):
    """Two prompts of a batch have scores: with four minibatches two update, two leave all but the step as it is."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2} if shape == "eight devices" else {"data": 1, "fsdp": 1, "tensor": 1}
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    c = ppo_config(
        batch_size=16,
        grad_accum_steps=1 if shape == "eight devices" else 2,
        **{
            "algorithm.num_minibatches": 4,
            "algorithm.num_ppo_epochs": 1,
            "algorithm.max_approx_kl": 10.0,
            "rewards.normalize": True,
            "rollout.num_samples": 1 if shape == "eight devices" else 2,
        },
    )
    w = world(some({3, 7}), config=c, prompts=[[1, 7 + i] for i in range(16)], perturb=0.05, mesh=mesh)
    with jax.set_mesh(mesh):
        state, batches, _, _ = w.prepare(w.state, w.frozen, w.batch)
        learned = []
        for number, batch in enumerate(batches):
            before = snapshot(state)
            state, metrics = w.step(state, w.frozen, batch)
            jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), metrics)
            same = jax.tree.leaves(jax.tree.map(np.array_equal, before, snapshot(state)))
            assert int(state.step) == number + 1 and not float(metrics["stopped"])
            assert all(same) == (float(metrics["weight/policy"]) == 0), "the parameters moved where there was weight"
            learned.append(not all(same))
    assert sorted(learned) == [False, False, True, True]


def test_prompts_with_scores_are_spread_over_the_minibatches():
    """Four prompts of eight have scores: each of four minibatches gets one, whatever the order."""
    c = ppo_config(batch_size=8, **{"algorithm.num_minibatches": 4, "algorithm.num_ppo_epochs": 3})
    w = world(some({1, 2, 5, 6}), config=c)
    _, batches, _, _ = w.prepare(w.state, w.frozen, w.batch)
    assert [int(np.asarray(b.batch.readouts.mask).any(1).sum()) for b in batches] == [1] * 12


def test_fewer_prompts_than_minibatches_and_none_with_a_score():
    c = ppo_config(batch_size=8, **{"algorithm.num_minibatches": 4, "algorithm.num_ppo_epochs": 1})
    w = world(some({0}), config=c)
    batch = put_batch(prompt_batch(w.prompts[:2], 5, 8), w.mesh)
    _, batches, metrics, samples = w.prepare(w.state, w.frozen, batch)
    assert sorted(int(np.asarray(b.batch.readouts.mask).any()) for b in batches) == [0, 0, 0, 1]
    assert np.isclose(metrics["objective/scores"], samples[0]["score"])
    w.prepare.collector.reward.function = some(set())
    _, batches, metrics, _ = w.prepare(w.state, w.frozen, batch)  # not a whole batch: nothing to learn, no error
    assert not any(np.asarray(b.batch.readouts.mask).any() for b in batches)
    assert "objective/scores" not in metrics and np.isfinite(metrics["objective/kl"])
    with pytest.raises(InputError, match="None for every completion"):
        w.prepare(w.state, w.frozen, w.batch)
    sums = w.prepare.evaluate(w.state, w.frozen, w.batch, w.prepare.collector.records)  # which has nothing to learn
    assert sums["objective/scores"][1] == 0 and sums["objective/kl"][1] == 8
