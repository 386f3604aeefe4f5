"""Runs that add tokens to their model: every role has them, and so have the export, its tokenizer and what goes on."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file
from stage_world import rows, stage_of, state_of

import jaxalign
from jaxalign.cli import main
from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.ops.trees import by_path, join
from jaxalign.pipeline.named import named_config
from jaxalign.train import trainer
from jaxalign.train.stage import stage_warnings

TOKENS = ("<|im_start|>", "<|im_end|>")
FIELDS = {
    "num_train_steps": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "model.add_tokens": TOKENS,
}
ROWS = 512  # of the model; its tokenizer has as many tokens


def spec(shared, workdir, algorithm, **fields):
    return make_config(stories(shared, workdir, algorithm, **FIELDS | fields))


def told_of_tokens(config):
    return [warning for warning in stage_warnings(stage_of(config)) if "add_tokens" in warning]


@pytest.fixture
def chats(tmp_path):
    """Texts with the new tokens, as a chat template writes them."""
    file = tmp_path / "chats.jsonl"
    text = "<|im_start|>user\nOnce upon<|im_end|>\n<|im_start|>assistant\na time {}<|im_end|>\n"
    file.write_text("".join(json.dumps({"text": text.format("x " * i)}) + "\n" for i in range(16)))
    return str(file)


def test_sft_and_what_goes_on_from_it(shared, tmp_path, chats):
    fields = {"data.sources": (chats,), "batch_size": 8}
    config = spec(shared, tmp_path / "sft", "sft", **fields)
    results = trainer.run(config, devices=jax.devices()[:2])
    assert results["steps"] == 2 and told_of_tokens(config) == []
    export = tmp_path / "sft" / "export"
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 576
    tokenizer = load_tokenizer(export)
    assert tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False) == [ROWS, ROWS + 1]
    before = load_file(shared / "models" / "stories260k-llama" / "model.safetensors")
    table = load_file(export / "model.safetensors")["model.embed_tokens.weight"]
    mean = before["model.embed_tokens.weight"].astype(np.float64).mean(0)
    assert table.shape == (576, 64) and np.abs(table[ROWS] - table[ROWS + 1]).max() > 1e-4  # they were trained
    np.testing.assert_allclose(table[ROWS:], np.tile(mean, (64, 1)), atol=5e-3)

    assert main(["export", "--workdir", str(tmp_path / "sft"), "--out", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes(), name

    # Going on needs them no more, and naming them again changes nothing.
    found = []
    for name, tokens in (("without", ()), ("with", TOKENS)):
        more = {"model.path": str(export), "model.add_tokens": tokens}
        trainer.run(spec(shared, tmp_path / name, "sft", **fields | more), devices=jax.devices()[:2])
        found.append(load_file(tmp_path / name / "export" / "model.safetensors"))
        assert load_tokenizer(tmp_path / name / "export").get_vocab() == tokenizer.get_vocab()
    assert (
        all((found[0][k] == found[1][k]).all() for k in found[0])
        and found[0]["model.embed_tokens.weight"].shape[0] == 576
    )


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("dpo", {}),
        ("dpo", {"algorithm.reference": "cached"}),
        ("dpo", {"adapter.rank": 4, "model.frozen_dtype": "nf4", "model.train": ("embed",)}),
        ("ppo", {}),
        ("reward", {}),
    ],
)
def test_all_roles_have_them(shared, tmp_path, algorithm, more):
    config = spec(shared, tmp_path / "run", algorithm, **more)
    trainer.run(config, devices=jax.devices()[:2])
    figures = rows(tmp_path / "run")[0]
    if algorithm == "dpo":
        assert abs(figures["rewards/margins"]) <= (1e-3 if "algorithm.reference" in more else 0.0)
    if algorithm == "ppo":
        assert figures["objective/kl"] == 0.0
    told = json.loads((tmp_path / "run/export/config.json").read_text())
    assert told["vocab_size"] == 576
    assert ["whole model" in w for w in told_of_tokens(config)] == [True] * ("adapter.rank" in more)
    stage = stage_of(config)
    for role in (*stage.program.trained.values(), *stage.program.frozen.values()):
        for path, x in by_path(role.abstract()).items():
            assert path != "embed/embedding" or x.shape[0] == 576


def test_one_device_and_eight_give_the_same_model(shared, tmp_path, chats):
    found = []
    for devices in (1, 8):
        fields = {"batch_size": 8, "data.sources": (chats,), "model.dtype": "float64", "model.param_dtype": "float64"}
        with jax.enable_x64(True):
            config = spec(shared, tmp_path / str(devices), "sft", **fields)
            config.mesh.tensor = 2 if devices == 8 else 1
            trainer.run(config, devices=jax.devices()[:devices])
        found.append(load_file(tmp_path / str(devices) / "export" / "model.safetensors"))
    for name, one in found[0].items():
        np.testing.assert_allclose(found[1][name], one, rtol=0, atol=1e-9, err_msg=name)


def test_an_adapter_leaves_as_a_whole_model_and_says_what_stays_frozen(shared, tmp_path, chats):
    fields = {"adapter.rank": 4, "data.sources": (chats,), "batch_size": 8}
    config = spec(shared, tmp_path / "run", "sft", **fields)
    trainer.run(config, devices=jax.devices()[:1])
    told = told_of_tokens(config)
    assert len(told) == 2 and "--config.model.train='embed[added]')" in told[0] and "whole model" in told[1]
    export = tmp_path / "run" / "export"
    assert not (export / "adapter_config.json").exists()
    table = load_file(export / "model.safetensors")["model.embed_tokens.weight"]
    assert (table[ROWS:] == table[ROWS]).all()
    model, params = jaxalign.load(export)
    stage = stage_of(config)
    batch = jax.tree.map(np.asarray, stage.dataset.batch(0).rows)
    role = stage.program.trained["policy"]
    trained = join(state_of(stage, 2).params["policy"], role.rest.load())
    mine = role.model.apply(trained, batch)[0]
    np.testing.assert_allclose(model.apply(params, batch)[0], mine, rtol=0, atol=2e-5)
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    config.model.train = ("norm", "embed")
    config.workdir = str(tmp_path / "trained")
    assert told_of_tokens(config) == told[1:]


def test_a_run_resumes_with_the_same_tokens_alone(shared, tmp_path, chats):
    fields = {"data.sources": (chats,), "batch_size": 8, "optimizer.schedule": "constant"}
    trainer.run(spec(shared, tmp_path / "run", "sft", **fields), devices=jax.devices()[:1])
    longer = fields | {"num_train_steps": 3}
    with pytest.raises(InputError, match=r"model.add_tokens \(was \['<|im_start|>"):
        trainer.run(spec(shared, tmp_path / "run", "sft", **longer | {"model.add_tokens": TOKENS[:1]}))
    found = trainer.run(spec(shared, tmp_path / "run", "sft", **longer), devices=jax.devices()[:1])
    assert found["steps"] == 3
    # A run of a version that had no such field.
    old = spec(shared, tmp_path / "old", "sft", **fields | {"model.add_tokens": ()})
    trainer.run(old, devices=jax.devices()[:1])
    file = tmp_path / "old" / "config.json"
    written = json.loads(file.read_text())
    del written["config"]["model"]["add_tokens"]
    file.write_text(json.dumps(written))
    longer = longer | {"model.add_tokens": ()}
    assert trainer.run(spec(shared, tmp_path / "old", "sft", **longer), devices=jax.devices()[:1])["steps"] == 3
    assert main(["export", "--workdir", str(tmp_path / "old"), "--out", str(tmp_path / "out")]) == 0


def test_a_reference_of_another_vocabulary_is_refused(shared, tmp_path):
    path = shared / "models" / "stories260k-llama"
    config = spec(shared, tmp_path / "run", "dpo", **{"algorithm.reference_path": str(path)})
    with pytest.raises(InputError, match=r"2 tokens of the reference .* are not the policy's: '<\|im_end\|>' is None"):
        stage_of(config)


@pytest.mark.parametrize(
    "given, match",
    [
        (("",), "holds ''"),
        ((" <a>",), "holds ' <a>'"),
        (("\n",), "neither begin nor end"),
        ((5,), "holds 5"),
        ((None,), "holds None"),
        (("<a>", "<b>", "<a>"), "holds '<a>' twice"),
        (None, "model.add_tokens is None"),
    ],
)
def test_bad_tokens(given, match):
    config = defaults("sft").unlock()
    config.model.path, config.workdir, config.data.sources = "m", "w", ("d.jsonl",)
    config.model.add_tokens = given if given is not None else ()
    if given is None:
        config = config.copy_and_resolve_references()
        with config.ignore_type():
            config.model.add_tokens = None
    with pytest.raises(InputError, match=match):
        validate(config)


def test_as_a_flag():
    base = ["--model=m", "--data=d.jsonl"]
    for text in ("<|im_start|>,<|im_end|>", '["<|im_start|>", "<|im_end|>"]'):
        assert named_config("sft", [*base, f"--add_tokens={text}"])[0].model.add_tokens == TOKENS
    assert named_config("sft", [*base, "--add_tokens=None"])[0].model.add_tokens == ()
