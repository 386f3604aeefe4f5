"""Runs that train vectors of some tokens: what is held, what exports and checkpoints have, and what is refused."""

import json
from shutil import copytree

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file, save_file
from stage_world import stage_of, state_of, tensors

from jaxalign.config import validate
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.ops.trees import by_path
from jaxalign.pipeline.export import export
from jaxalign.train import trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.models import bytes_by_role
from jaxalign.train.stage import stage_warnings

TOKENS = ("<|im_start|>", "<|im_end|>")
NAME = "model.embed_tokens.weight"
IDS = [3, 260, 261, 400]
FIELDS = {
    "num_train_steps": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "model.train": ("embed[3,260:262]", "embed_tokens[400]"),
}


def spec(shared, workdir, algorithm, **fields):
    return make_config(stories(shared, workdir, algorithm, **FIELDS | fields))


def made(shared, workdir, algorithm, devices=1, **fields):
    return stage_of(spec(shared, workdir, algorithm, **fields), devices)


def before(shared):
    return tensors(shared / "models" / "stories260k-llama")


def check_table(shared, export, ids=IDS):
    """Other vectors than these, and other tensors than the table, have the bits that they came with."""
    old, new = before(shared), tensors(export)
    moved = np.flatnonzero((old[NAME] != new[NAME][: len(old[NAME])]).any(1))
    assert set(moved) <= set(ids) and len(moved) > 0
    for name in old.keys() - {NAME}:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("sft", {"grad_accum_steps": 2, "optimizer.name": "muon"}),
        ("dpo", {}),
        ("dpo", {"algorithm.reference": "cached", "optimizer.name": "adafactor"}),
        ("reward", {}),
    ],
)
def test_a_run(algorithm, more, shared, tmp_path):
    config = spec(shared, tmp_path / "run", algorithm, **more)
    results = trainer.run(config, devices=jax.devices()[:2])
    assert results["num_compiles"] == 1
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if algorithm == "dpo" and not more.get("algorithm.reference"):
        assert figures[0]["rewards/margins"] == 0.0 and figures[1]["rewards/margins"] != 0.0
    check_table(shared, tmp_path / "run" / "export")
    hf.load(tmp_path / "run" / "export", dtype="float32", param_dtype="float32", remat="none")
    again = tensors(export(str(tmp_path / "run"), str(tmp_path / "again")))
    for name, x in tensors(tmp_path / "run" / "export").items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)

    # Roles share the table; moments and checkpoints are those of four vectors, and of a scalar head.
    stage = made(shared, tmp_path / "run", algorithm, 2, **more)
    for role in stage.program.trained.values():
        held = by_path(role.abstract())
        assert held.keys() - {"score/kernel"} == {"embed/token_rows"} and held["embed/token_rows"].shape == (4, 64)
        assert "embed/embedding" in by_path(role.rest.abstract())
    for role in stage.program.frozen.values():
        assert "embed/token_rows" not in by_path(role.abstract())  # the base's are in its table
    if "optimizer.name" not in more:
        assert results["optimizer_bytes"] < 2.1 * len(stage.program.trained) * 4 * 5 * 64
    state, frozen, _ = step_arguments(stage)
    assert bytes_by_role(state.params, frozen) == results["model_bytes"]
    if algorithm == "dpo" and not more.get("algorithm.reference"):
        assert results["model_bytes"]["ref"] == 0
    name = stage.program.exported
    learned = by_path(state_of(stage, 2).params[name])["embed/token_rows"]
    np.testing.assert_array_equal(tensors(tmp_path / "run" / "export")[NAME][IDS], learned)


def test_it_learns_what_full_training_learns_of_these_vectors(shared, tmp_path):
    plain = {"optimizer.name": "sgd", "optimizer.b1": 0.0, "optimizer.max_grad_norm": 0.0, "num_train_steps": 1}
    found = {}
    for name, patterns in (("some", FIELDS["model.train"]), ("all", ())):
        config = spec(shared, tmp_path / name, "sft", **plain | {"model.train": patterns})
        trainer.run(config, devices=jax.devices()[:1])
        found[name] = tensors(tmp_path / name / "export")[NAME]
    check_table(shared, tmp_path / "some" / "export")
    np.testing.assert_allclose(found["some"][IDS], found["all"][IDS], rtol=0, atol=1e-6)


def test_one_device_and_eight_learn_the_same(shared, tmp_path):
    found = []
    for devices in (1, 8):
        with jax.enable_x64(True):
            fields = {"batch_size": 8, "model.dtype": "float64", "model.param_dtype": "float64"}
            config = spec(shared, tmp_path / str(devices), "dpo", **fields)
            trainer.run(config, devices=jax.devices()[:devices])
            stage = made(shared, tmp_path / str(devices), "dpo", devices, **fields)
            found.append(by_path(jax.device_get(state_of(stage, 2).params["policy"])))
    for path, one in found[0].items():
        np.testing.assert_allclose(found[1][path], one, rtol=0, atol=1e-9, err_msg=path)


def test_a_run_that_was_cut_resumes_to_the_same_bits(shared, tmp_path):
    constant = {"optimizer.schedule": "constant"}
    trainer.run(spec(shared, tmp_path / "whole", "sft", **constant), devices=jax.devices()[:1])
    for steps in (1, 2):
        trainer.run(spec(shared, tmp_path / "cut", "sft", **constant, num_train_steps=steps), devices=jax.devices()[:1])
    one, other = (tensors(tmp_path / name / "export") for name in ("whole", "cut"))
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


@pytest.mark.parametrize("algorithm, kind", [("dpo", "nf4"), ("sft", "bfloat16")])
def test_added_tokens_beside_an_adapter(algorithm, kind, shared, tmp_path):
    more = {"model.add_tokens": TOKENS, "model.train": ("embed[added]",), "model.frozen_dtype": kind, "adapter.rank": 4}
    if kind == "bfloat16":
        more["model.dtype"] = "bfloat16"
    trainer.run(spec(shared, tmp_path / "run", algorithm, **more), devices=jax.devices()[:2])
    stage = made(shared, tmp_path / "run", algorithm, 2, **more)
    name = stage.program.exported
    learned = by_path(state_of(stage, 2).params[name])["embed/token_rows"]
    table = tensors(tmp_path / "run" / "export")[NAME]
    assert learned.shape == (2, 64) and table.shape == (576, 64)
    np.testing.assert_array_equal(table[512:514], learned)
    old = before(shared)[NAME]
    if kind == "bfloat16":
        old = np.asarray(jax.numpy.asarray(old, "bfloat16"), np.float32)
    np.testing.assert_array_equal(table[:512], old)
    assert not [said for said in stage_warnings(stage) if "cannot be told apart" in said]


def test_vectors_of_an_untied_head(shared, tmp_path):
    """The value model, which has no such head, trains its embedding's alone."""
    source, copy = shared / "models" / "stories260k-llama", tmp_path / "untied"
    copytree(source, copy)
    told = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": False}
    (copy / "config.json").write_text(json.dumps(told))
    old = before(shared) | {"lm_head.weight": before(shared)[NAME].copy()}
    save_file(old, copy / "model.safetensors", metadata={"format": "pt"})
    more = {"model.path": str(copy), "model.train": ("embed[3,260:262]", "lm_head[300:400]")}
    trainer.run(spec(shared, tmp_path / "run", "ppo", **more), devices=jax.devices()[:2])
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert figures[0]["objective/kl"] == 0.0
    new = tensors(tmp_path / "run" / "export")
    moved = {name for name, x in old.items() if not np.array_equal(x, new[name])}
    assert "lm_head.weight" in moved and moved <= {NAME, "lm_head.weight"}
    rows = np.flatnonzero((old["lm_head.weight"] != new["lm_head.weight"]).any(1))
    assert len(rows) == 100 and rows[0] == 300
    stage = made(shared, tmp_path / "run", "ppo", 2, **more)
    held = {name: set(by_path(role.abstract())) for name, role in stage.program.trained.items()}
    assert held["policy"] == {"embed/token_rows", "lm_head/token_rows"}
    assert held["value"] == {"embed/token_rows", "score/kernel"}


def test_an_adapter_with_vectors_goes_on(shared, tmp_path):
    """Its export is an adapter; the next stage trains its vectors on beside the base's table, which roles share."""
    more = {"adapter.rank": 4, "adapter.targets": ("q_proj",)}
    trainer.run(spec(shared, tmp_path / "sft", "sft", **more), devices=jax.devices()[:2])
    first = load_file(tmp_path / "sft/export/adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert first[key].shape == (4, 64)
    told = json.loads((tmp_path / "sft/export/adapter_config.json").read_text())
    assert told["trainable_token_indices"] == {"embed_tokens": IDS}
    on = {"model.path": str(tmp_path / "sft/export"), "model.train": (), "optimizer.learning_rate": 1e-3}
    results = trainer.run(spec(shared, tmp_path / "dpo", "dpo", **on), devices=jax.devices()[:2])
    assert results["model_bytes"]["ref"] < 4 * 64 * len(before(shared)[NAME])
    figures = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert figures[0]["rewards/margins"] == 0.0 and figures[1]["rewards/margins"] != 0.0
    second = load_file(tmp_path / "dpo/export/adapter_model.safetensors")
    assert second.keys() == first.keys() and np.any(second[key] != first[key])
    ref = made(shared, tmp_path / "dpo", "dpo", 2, **on).program.frozen["ref"]
    np.testing.assert_array_equal(by_path(ref.load())["embed/token_rows"], first[key])
    export(str(tmp_path / "dpo"), str(tmp_path / "merged"), merge=True)
    np.testing.assert_array_equal(tensors(tmp_path / "merged")[NAME][IDS], second[key])
    with pytest.raises(InputError, match=r"vectors of some tokens, and model\.train names others"):
        made(shared, tmp_path / "dpo", "dpo", **on | {"model.train": ("embed[5]",)})
    with pytest.raises(InputError, match="names some vectors of embed/embedding, and all of it"):
        made(shared, tmp_path / "dpo", "dpo", **on | {"model.train": ("embed",)})


@pytest.mark.parametrize(
    "patterns, said, fix",
    [
        (("embed[512]",), r"names 512 of 512 ids, which goes beyond them", "embed[510:]"),
        (("embed[500:600]",), r"names 500:600 of 512 ids, which goes beyond them", "embed[510:]"),
        (("embed[5:5]",), "which holds no id", "embed[510:]"),
        (("mlp[0:4]",), "names rows of mlp, which has no vectors of tokens", "embed[0:4]"),
        (("lm_head[3]",), "names rows of lm_head", "embed[3]"),
        (("embed[3]", "embed"), "names some vectors of embed/embedding, and all of it is trained", "=embed"),
    ],
)
def test_what_is_refused(patterns, said, fix, shared, tmp_path):
    with pytest.raises(InputError, match=said) as caught:
        made(shared, tmp_path / "run", "sft", **{"model.train": patterns})
    assert fix in caught.value.fix


def test_added_without_added_tokens(shared, tmp_path):
    with pytest.raises(InputError, match="no tokens are added") as caught:
        validate(spec(shared, tmp_path / "run", "sft", **{"model.train": ("embed[2,added]",)}))
    assert "model.add_tokens" in caught.value.fix
