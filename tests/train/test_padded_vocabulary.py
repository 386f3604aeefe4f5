"""A vocabulary padded beyond the tokenizer: what is sampled has a text, and what is trained keeps its rows."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.cli import main
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.added_tokens import Added
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.pipeline.loaded import load_model
from jaxalign.rollout.sampling import Sampling
from jaxalign.train import trainer

SETTINGS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
TOKENS, ROWS = 512, 640
FIELDS = {"num_train_steps": 1, "checkpoint.every": 0, "batch_size": 4}


@pytest.fixture(scope="module")
def padded(request, tmp_path_factory):
    """A real model whose spare rows are those of likely tokens: without a mask most of what is sampled are such ids."""
    directory = tmp_path_factory.mktemp("padded") / "model"
    path = request.getfixturevalue("shared") / "models" / "stories260k-llama"
    model, params = hf.load(path, added=Added(TOKENS, (ROWS - 1,), ((0, TOKENS),)), **SETTINGS)
    table = np.array(params["embed"]["embedding"])
    table[TOKENS:] = table[np.arange(ROWS - TOKENS) % 8 + 410]  # single letters
    params["embed"]["embedding"] = jax.numpy.asarray(table)
    hf.save(directory, model, params, source=path)
    return directory


def samples(directory):
    return [json.loads(line) for file in directory.glob("samples/*.jsonl") for line in file.read_text().splitlines()]


def test_generation(padded):
    loaded = load_model(str(padded), head="lm")
    assert loaded.model.config.vocab_size == ROWS
    generator = loaded.generator(Sampling(1.0, 24), batch_size=4)
    for found in generator(["Once upon a time", "One day"] * 4, seed=0):
        assert max(found.ids) < TOKENS and found.text


def test_sft_and_its_export(shared, padded, tmp_path):
    config = make_config(stories(shared, tmp_path / "run", "sft", **FIELDS | {"model.path": str(padded)}))
    trainer.run(config, devices=jax.devices()[:2])
    before, after = (load_file(d / "model.safetensors") for d in (padded, tmp_path / "run" / "export"))
    assert after["model.embed_tokens.weight"].shape == before["model.embed_tokens.weight"].shape == (ROWS, 64)
    assert len(load_tokenizer(tmp_path / "run" / "export")) == TOKENS
    data = tmp_path / "held.jsonl"
    data.write_text(json.dumps({"prompt": "Once", "completion": " upon a time"}) + "\n")
    assert main(["evaluate", "--model", str(tmp_path / "run" / "export"), "--data", str(data)]) == 0


def test_spare_rows_of_a_value_model_are_no_vectors_of_added_tokens(shared, padded, tmp_path):
    fields = {"model.add_tokens": ("<|im_start|>",), "algorithm.value_path": str(padded)}
    config = make_config(stories(shared, tmp_path / "run", "ppo", **FIELDS | fields))
    with pytest.raises(InputError, match=r"1 tokens of the value model .*'<\|im_start\|>' is None there and 512 here"):
        trainer.run(config, devices=jax.devices()[:1])


def test_ppo_with_a_smaller_reward_and_value_model(shared, padded, tmp_path):
    """Their vocabulary is that of the tokenizer: an id beyond it would have no vector there, and scores of NaN."""
    path = shared / "models" / "stories260k-llama"
    hf.save(tmp_path / "reward", *hf.load(path, head="score", key=jax.random.key(0), **SETTINGS), source=path)
    fields = {"model.path": str(padded), "rewards.model": str(tmp_path / "reward"), "rewards.function": None}
    fields |= {"logging.samples_every": 1, "rollout.max_new_tokens": 16}
    config = make_config(stories(shared, tmp_path / "run", "ppo", **FIELDS | fields))
    trainer.run(config, devices=jax.devices()[:2])
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    assert row["objective/kl"] == 0.0
    found = samples(tmp_path / "run")
    assert found and all(one["completion"] for one in found)
