"""Exports under transformers 4.57 and 5: both load them, with the same tokens and logits as here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.models import hf
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.ops.readout import scalar_readout
from jaxalign.types import Readouts
from tests.models import tiny_models as tiny

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(os.environ.get("JAXALIGN_ORACLE_T4_PYTHON", ROOT / ".venv-oracle-t4" / "bin" / "python"))
TEXTS = ["Once upon a time\n  there", " déjà vu 🦊", "a</s>b <|endoftext|>c <|im_end|>d", "", "x\n\n\ty  <s>"]
ROPES = {
    "qwen2-rebuilt": {"rope_type": "default", "rope_theta": 50000.0},
    "llama2-spm": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
    "mistral-v3-spm": tiny.VARIANTS["one_key_llama3"]["rope_parameters"],
    "gpt2": {"rope_type": "default", "rope_theta": 300.0},
    "gpt-neox-20b": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "minimind-6400": tiny.VARIANTS["one_key_llama3"]["rope_parameters"],
}


@pytest.fixture(scope="module")
def exports(request, tmp_path_factory):
    """An export with each tokenizer, one of them a reward model; what they say here."""
    shared, folder = request.getfixturevalue("shared"), tmp_path_factory.mktemp("exports")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    ids, logits = {}, {}
    for number, (name, rope) in enumerate(ROPES.items()):
        tokenizer = load_tokenizer(shared / "tokenizers" / name)
        head = "score" if name == "gpt-neox-20b" else "lm"
        config = tiny.hf_config(
            vocab_size=len(tokenizer), rope_parameters=rope, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        )
        source = tmp_path_factory.mktemp("source")
        tiny.write(source, config, tiny.tensors(config, head=head, seed=number))
        model, params = hf.load(source, head=head, key=jax.random.key(number), **tiny.SETTINGS)
        out = hf.save(folder / name, model, params, source=source, tokenizer=tokenizer)
        assert set(json.loads((out / "config.json").read_text())) >= {"rope_theta", "rope_scaling", "rope_parameters"}
        hidden = model.apply(params, None, tiny.causal(np.arange(3, 43)[None]))[0]
        if head == "lm":
            logits[name] = np.asarray(hidden[0] @ model.head(params))
        else:
            last = np.array([[39]], np.int32)
            readouts = Readouts(last, last, 0 * last, np.ones((1, 1), bool))
            logits[name] = np.asarray(scalar_readout(hidden, model.score_kernel(params), readouts))[0]
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        ids[name] = {
            "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
            "special": sorted(tokenizer.all_special_ids),
            "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
            "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None,
        }
    return folder, ids, logits


@pytest.mark.parametrize("version", ["4.57.6", "5"])
def test_exports_load_alike(exports, tmp_path, version):
    folder, ids, logits = exports
    python = OLD if version.startswith("4") else sys.executable
    if not Path(python).exists():
        pytest.skip(f"no {python}: a virtual environment with transformers {version} (JAXALIGN_ORACLE_T4_PYTHON)")
    script = Path(__file__).with_name("transformers_run.py")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"HF_HUB_OFFLINE": "1"}
    out, arrays = tmp_path / "out.json", tmp_path / "out.npz"
    done = subprocess.run([python, script, folder, out, arrays], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, numbers = json.loads(out.read_text()), np.load(arrays)
    assert theirs.pop("version").split(".")[: version.count(".") + 1] == version.split(".")
    assert theirs == ids
    for name, expected in logits.items():
        np.testing.assert_allclose(numbers[name].ravel(), expected.ravel(), rtol=1e-4, atol=1e-4, err_msg=name)
