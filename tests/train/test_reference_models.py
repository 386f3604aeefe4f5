"""A reference is computed with its own model: its adapter or none, its config, its bits, not the policy's."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_child import make_config, stories
from test_adapters import made, rows

from jaxalign.models import adapter as adapters
from jaxalign.models import hf
from jaxalign.models.adapter import Rules
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import joined
from jaxalign.rollout.completed import Rollout
from jaxalign.train import trainer
from jaxalign.train.samples import Sampler
from tests.models import tiny_models as tiny
from tests.models.test_peft import moved

SETTINGS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
FIELDS = {"num_train_steps": 1, "checkpoint.every": 0, "data.max_records": 12, "adapter.rank": 4}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """References with the base's tokens: an adapter of a small scale, one of queries alone, another base of rope."""
    from tests.conftest import SHARED

    root, base = tmp_path_factory.mktemp("references"), SHARED / "models" / "stories260k-llama"
    model, params = hf.load(base, **SETTINGS)
    for name, rules in (("small", Rules(4, 2.0)), ("queries", Rules(4, 2.0, ("q_proj",)))):
        adapted = Model(dataclasses.replace(model.config, adapter=adapters.make(model.config, rules)))
        own = jax.tree.map(lambda x: 0.3 * x, moved(adapted, params)[1])
        hf.save(root / name, adapted, own, base=str(base), source=base)
    shutil.copytree(base, root / "rope")
    config = json.loads((root / "rope" / "config.json").read_text())
    config.pop("rope_parameters", None)
    (root / "rope" / "config.json").chmod(0o644)
    (root / "rope" / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0}))
    return root


def logprob(model, params, prompt, completion):
    """Nats of a completion, at temperature 1, by a row of its own."""
    tokens = [*prompt, *completion]
    hidden = model.apply(params, tiny.causal(np.array([tokens], np.int32)))[0]
    logits = np.asarray(hidden[0] @ model.head(params), np.float64)
    logits -= np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(completion))


@pytest.mark.parametrize(
    "reference, more",
    [
        ("small", {}),
        ("small", {"adapter.rank": 0}),
        ("queries", {"model.remat": "full"}),
        ("rope", {"adapter.rank": 0}),
        (None, {"adapter.rank": 0, "model.frozen_dtype": "int8"}),
        ("queries", {"adapter.rank": 0, "model.frozen_dtype": "nf4"}),
        ("small", {"adapter.dora": True, "model.frozen_dtype": "nf4"}),
    ],
)
def test_trap_a_live_reference_is_the_cached_one(reference, more, starts, shared, tmp_path):
    """The first step's figures, whichever adapter, config or bits the reference has and the policy has not."""
    path = reference and str(starts / reference)
    found = {}
    for kind in ("live", "cached"):
        fields = FIELDS | more | {"algorithm.reference": kind, "algorithm.reference_path": path}
        trainer.run(make_config(stories(shared, tmp_path / kind, "dpo", **fields)), devices=jax.devices()[:1])
        found[kind] = rows(tmp_path / kind)[0]
    assert abs(found["cached"]["rewards/margins"]) > 1e-4  # it is another model than the policy
    for figure in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
        np.testing.assert_allclose(found["live"][figure], found["cached"][figure], rtol=1e-3, atol=2e-5, err_msg=figure)


def test_trap_the_kl_of_samples_is_to_the_references_own_model(starts, shared, tmp_path):
    fields = FIELDS | {"algorithm.reference_path": str(starts / "small"), "rollout.temperature": 1.0}
    stage = made(shared, tmp_path / "run", "dpo", **fields)
    sampler = Sampler(stage)
    examples, batch = sampler._prompts
    count = len(batch.rows.tokens)
    tokens = np.random.default_rng(0).integers(3, 500, (count, 4)).astype(np.int32)
    there, zeros = np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    frozen, policy = stage.frozen(), hf.load(shared / "models" / "stories260k-llama", **SETTINGS)
    with jax.set_mesh(stage.mesh):
        # A fresh adapter is the base.
        whole = {"policy": stage.program.trained["policy"].load()}
        whole = joined(whole, frozen)["policy"]
        kl = sampler._kl(whole, frozen["ref"], batch.rows, Rollout(tokens, there, there, zeros, there[:, 0]))
    ref = hf.load(starts / "small", **SETTINGS)  # merged
    for i, example in enumerate(examples[:2]):
        prompt, completion = example.prompt.tolist(), tokens[i].tolist()
        expected = logprob(*policy, prompt, completion) - logprob(*ref, prompt, completion)
        assert abs(expected) > 0.01
        np.testing.assert_allclose(kl[i], expected, rtol=0, atol=1e-4)


def test_trap_ppo_measures_a_reference_in_few_bits_with_its_own_model(shared, tmp_path):
    """Beside a policy that is trained in full."""
    fields = FIELDS | {"adapter.rank": 0, "model.frozen_dtype": "int8", "num_train_steps": 2}
    trainer.run(make_config(stories(shared, tmp_path / "run", "ppo", **fields)), devices=jax.devices()[:2])
    assert all(np.isfinite(row["objective/kl"]) and row["grad_norm/policy"] > 0 for row in rows(tmp_path / "run"))

    stage = made(shared, tmp_path / "stage", "ppo", **fields)
    state, frozen = stage.start(), stage.frozen()
    with jax.set_mesh(stage.mesh):
        batch = jax.tree.map(jnp.asarray, stage.dataset.batch(0))
        found = stage.program.prepare.collector.collect(state.params, frozen, batch, state.data_cursor, 0)[0]
    whole, few = (hf.load(shared / "models" / "stories260k-llama", **SETTINGS, quantised=q) for q in (None, "int8"))
    for i in range(2):
        prompt = stage.dataset.example(int(batch.record_ids[i, 0])).prompt.tolist()
        completion = np.asarray(found.rollout.tokens[i])[np.asarray(found.rollout.sampled[i])].tolist()
        for model, forward in ((whole, found.forward.logprobs), (few, found.forward.ref_logprobs)):
            expected = logprob(*model, prompt, completion)
            np.testing.assert_allclose(np.sum(forward[i]), expected, rtol=0, atol=1e-4)
    assert np.abs(found.forward.logprobs - found.forward.ref_logprobs).max() > 1e-3
