"""Runs in which a part of the policy is trained: the rest is frozen, shared with the reference, exported with it."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from stage_world import stage_of, tensors

from jaxalign.parallel.device_memory import num_bytes
from jaxalign.train import algorithms, trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.models import bytes_by_role

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention(path):
    return path.startswith("layers/attention/")


@pytest.fixture
def in_part(monkeypatch):
    """Every algorithm's policy is trained in its attention alone."""
    build = algorithms.build

    def divided(*given):
        program = build(*given)
        policy = program.trained["policy"]
        trained = policy._replace(holds=attention)
        rest = policy._replace(holds=lambda path: not attention(path))
        return program._replace(trained=program.trained | {"policy": trained}, frozen=program.frozen | {"policy": rest})

    monkeypatch.setattr(algorithms, "build", divided)


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_a_run_that_trains_attention_alone(algorithm, shared, tmp_path, in_part):
    fields = {"num_train_steps": 2, "checkpoint.every": 1, "optimizer.learning_rate": 1e-5, "optimizer.warmup_steps": 0}
    config = make_config(stories(shared, tmp_path / "run", algorithm, **fields))
    results = trainer.run(config, devices=jax.devices()[:2])
    assert results["num_compiles"] == 1
    before, after = tensors(shared / "models" / "stories260k-llama"), tensors(tmp_path / "run" / "export")
    assert before.keys() <= after.keys()
    moved = {name for name, x in before.items() if not np.array_equal(x, after[name])}
    assert moved and moved == {name for name in before if name.split(".")[-2] in ATTENTION}

    sizes = results["model_bytes"]
    stage = stage_of(make_config(stories(shared, tmp_path / "other", algorithm, **fields)))
    policy = stage.program.trained["policy"]
    state, frozen, _ = step_arguments(stage)
    assert bytes_by_role(state.params, frozen) == sizes  # what a dry run says
    part = num_bytes(policy.abstract())
    assert sizes["policy"] == num_bytes(policy.model.abstract()) and sizes["ref"] == part  # the rest is the policy's
    if algorithm == "dpo":
        assert results["optimizer_bytes"] < 2.1 * part
        first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["rewards/margins"] == 0.0 and first["grad_norm"] > 0
    frozen = stage.frozen()
    shared_leaves = {id(x) for x in jax.tree.leaves(frozen["policy"])}
    assert shared_leaves < {id(x) for x in jax.tree.leaves(frozen["ref"])}


def test_frozen_roles_of_one_source_are_loaded_once(shared, tmp_path):
    stage = stage_of(make_config(stories(shared, tmp_path / "run", "dpo")))
    ref, reads = stage.program.frozen["ref"], []
    counted = ref._replace(read=lambda wanted: reads.append(1) or ref.read(wanted))
    other = counted._replace(origin=lambda path: "elsewhere")
    stage.program = stage.program._replace(frozen={"ref": counted, "base": counted, "half": other})
    frozen = stage.frozen()
    assert len(reads) == 2
    same = [a is b for a, b in zip(jax.tree.leaves(frozen["ref"]), jax.tree.leaves(frozen["base"]), strict=True)]
    assert all(same) and same
    assert frozen["half"]["norm"]["scale"] is not frozen["ref"]["norm"]["scale"]
