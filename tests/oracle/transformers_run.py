"""Loads exports with the transformers of this environment; `test_export_transformers4.py` runs it in two of them.

    python transformers_run.py FOLDER OUT.json OUT.npz

FOLDER holds exports and `texts.json`; a language model gives ids and logits, a reward model its scores.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

folder, out, arrays = map(Path, sys.argv[1:])
texts = json.loads((folder / "texts.json").read_text())
found, logits = {"version": transformers.__version__}, {}
for directory in sorted(p for p in folder.iterdir() if p.is_dir()):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    found[directory.name] = {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "special": sorted(tokenizer.all_special_ids),
        "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None,
    }
    score = "SequenceClassification" in json.loads((directory / "config.json").read_text())["architectures"][0]
    kind = transformers.AutoModelForSequenceClassification if score else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits[directory.name] = model(torch.arange(3, 43)[None]).logits[0].numpy()
out.write_text(json.dumps(found))
np.savez(arrays, **logits)
