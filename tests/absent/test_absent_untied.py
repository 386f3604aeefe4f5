"""Accumulated gradients of an untied head, compiled ahead of time for a TPU slice, as configs/ppo.py needs it."""

import json

from jaxalign import config as configuration
from jaxalign.plan.plan import plan_step


def test_trap_accumulation_with_an_untied_head_compiles(shared, tmp_path):
    """libtpu's motion of all-reduces out of loops failed where an untied head's gradient was added up."""
    model = shared / "models" / "stories3m-llama"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".model"):
            (folder / file.name).write_bytes(file.read_bytes())
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"tie_word_embeddings": False}))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "The red fox", "completion": " ran to the big green tree and sat down."}\n' * 64)
    c = configuration.defaults("sft")
    c.workdir, c.model.path, c.data.sources = str(tmp_path), str(folder), (str(data),)
    c.model.dtype = "bfloat16"
    c.data.max_length = 128
    c.batch_size, c.grad_accum_steps = 32, 2
    assert plan_step(c, "tpu:v5p:2x2x2")["programs"][0]["fits"]
