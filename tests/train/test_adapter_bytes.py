"""What a step is given where adapters are trained, at the shape of Llama-3.2-1B: one base, and little beside it."""

import json
import shutil

import jax
import pytest
from run_child import make_config, stories

from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.train import trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.rundir import RunDir

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
NUMBERS = 1_235_814_400  # as its model card has them


@pytest.mark.parametrize("algorithm, most", [("sft", 1.06), ("dpo", 1.06), ("ppo", 1.25)])
def test_one_base_of_bfloat16(algorithm, most, shared, tmp_path):
    source = shared / "models" / "stories260k-llama"
    (tmp_path / "model").mkdir()
    for file in source.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    described = json.loads((source / "config.json").read_text()) | LLAMA_1B
    (tmp_path / "model" / "config.json").write_text(json.dumps(described))
    fields = {
        "model.path": str(tmp_path / "model"),
        "model.frozen_dtype": "bfloat16",
        "model.dtype": "bfloat16",
        "adapter.rank": 16,
    }
    config = make_config(stories(shared, tmp_path / "run", algorithm, **fields))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stage = trainer.Stage(config, mesh, RunDir(config.workdir))  # of shapes: no weights are there
    state, frozen, _ = step_arguments(stage)
    assert num_bytes(frozen) == 2 * NUMBERS
    assert num_bytes((state.params, state.opt, frozen)) <= most * 2 * NUMBERS
