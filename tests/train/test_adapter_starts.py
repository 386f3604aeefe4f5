"""Runs that start from adapters: trained on beside their base, which all roles share; references are frozen copies."""

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file
from stage_world import rows, stage_of

from jaxalign.errors import InputError
from jaxalign.models.adapter import is_adapter
from jaxalign.ops.trees import by_path
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.pipeline.export import export
from jaxalign.train import trainer
from jaxalign.train.stage import stage_warnings

FIELDS = {
    "num_train_steps": 2,
    "checkpoint.every": 2,
    "adapter.rank": 4,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Adapters on one base: after SFT, and a reward model."""
    from tests.conftest import SHARED

    root = tmp_path_factory.mktemp("adapters")
    for algorithm in ("sft", "reward"):
        config = make_config(stories(SHARED, root / algorithm, algorithm, **FIELDS | {"model.train": ("norm",)}))
        trainer.run(config, devices=jax.devices()[:1])
    return root


def made(shared, workdir, algorithm, **fields):
    return stage_of(make_config(stories(shared, workdir, algorithm, **FIELDS | fields)))


def test_dpo_goes_on_from_an_adapter_and_its_reference_is_a_copy_of_it(learned, shared, tmp_path):
    start = str(learned / "sft" / "export")
    for name, rank in (("as-it-is", 0), ("same", 4)):
        fields = FIELDS | {"model.path": start, "adapter.rank": rank, "model.train": ()}
        config = make_config(stories(shared, tmp_path / name, "dpo", **fields))
        results = trainer.run(config, devices=jax.devices()[:2])
        figures = rows(tmp_path / name)
        assert figures[0]["rewards/margins"] == 0.0 and figures[0]["grad_norm"] > 0
        assert figures[1]["rewards/margins"] != 0.0
        stage = made(shared, tmp_path / name, "dpo", **fields)
        policy = stage.program.trained["policy"]
        own = num_bytes(policy.abstract())
        assert {path for path in by_path(policy.abstract()) if not is_adapter(path)} == {"norm/scale"}
        assert results["model_bytes"]["ref"] == own  # of the base nothing
        card = (tmp_path / name / "export" / "README.md").read_text()
        assert "library_name: peft" in card and "An adapter of `" in card
    one, other = (load_file(tmp_path / name / "export" / "adapter_model.safetensors") for name in ("as-it-is", "same"))
    for tensor, x in one.items():
        np.testing.assert_array_equal(x, other[tensor], err_msg=tensor)


def test_ppo_on_one_base(learned, shared, tmp_path):
    fields = FIELDS | {
        "model.path": str(learned / "sft" / "export"),
        "rewards.model": str(learned / "reward" / "export"),
        "rewards.function": None,
        "algorithm.one_base": True,
        "model.train": (),
    }
    config = make_config(stories(shared, tmp_path / "run", "ppo", **fields))
    results = trainer.run(config, devices=jax.devices()[:2])
    stage = made(shared, tmp_path / "run", "ppo", **fields)
    base = num_bytes(stage.program.trained["policy"].rest.abstract())
    assert sum(results["model_bytes"].values()) < 1.5 * base  # of a model so small an adapter is a tenth
    assert rows(tmp_path / "run")[0]["objective/kl"] == 0.0


def test_one_base_equals_four_models(learned, shared, tmp_path):
    """Adapters merged into models of their own, and trained alike from there: the same samples, scores and losses."""
    merged = {}
    for name in ("sft", "reward"):
        merged[name] = str(export(str(learned / name), str(tmp_path / name), merge=True))
    common = FIELDS | {"rewards.function": None, "num_train_steps": 1, "adapter.rank": 0}
    beside = common | {
        "model.path": str(learned / "sft" / "export"),
        "rewards.model": str(learned / "reward" / "export"),
        "model.train": (),
    }
    apart = common | {"model.path": merged["sft"], "rewards.model": merged["reward"], "adapter.rank": 4}
    found = {}
    for name, fields in (("beside", beside), ("apart", apart)):
        trainer.run(make_config(stories(shared, tmp_path / name, "ppo", **fields)), devices=jax.devices()[:1])
        found[name] = rows(tmp_path / name)[0]
    for figure in ("objective/scores", "objective/entropy", "rollout/length", "objective/kl"):
        if figure in found["apart"]:
            np.testing.assert_allclose(found["beside"][figure], found["apart"][figure], rtol=1e-4, err_msg=figure)


def test_another_rank_than_that_of_the_adapter_is_refused(learned, shared, tmp_path):
    with pytest.raises(InputError, match="an adapter of rank 4, and the section `adapter` describes another") as caught:
        made(shared, tmp_path / "run", "dpo", **{"model.path": str(learned / "sft" / "export"), "adapter.rank": 8})
    assert "--config.adapter.rank=0" in caught.value.fix


def test_models_of_two_bases_are_refused_where_one_is_asked_for(learned, shared, tmp_path):
    merged = str(export(str(learned / "reward"), str(tmp_path / "reward"), merge=True))
    fields = {"rewards.model": merged, "rewards.function": None, "algorithm.one_base": True}
    with pytest.raises(InputError, match=r"algorithm\.one_base, and .* start from 2 models"):
        made(shared, tmp_path / "run", "ppo", **fields)


def test_a_learning_rate_of_whole_models_is_told(learned, shared, tmp_path):
    fields = {"model.path": str(learned / "sft" / "export"), "adapter.rank": 0, "optimizer.learning_rate": 1e-6}
    (said,) = [w for w in stage_warnings(made(shared, tmp_path / "run", "dpo", **fields)) if "goes on from" in w]
    assert said.endswith("--config.optimizer.learning_rate=1e-05")
