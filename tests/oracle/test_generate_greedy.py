"""Greedy decoding against `transformers.generate`, token for token, alone and in left-padded batches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rollout.greedy_cases import MODELS, NEW_TOKENS, PROMPTS, golden, ours

torch.set_num_threads(1)  # one token at a time: threads only wait for each other


def cut(ids, stops):
    """Up to the first stop token, which stays."""
    end = next((i + 1 for i, t in enumerate(ids) if t in stops), len(ids))
    return ids[:end]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers(shared, name):
    path = shared / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stops = model.generation_config.eos_token_id
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    alone = []
    for prompt in PROMPTS:
        inputs = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        alone.append(cut(out.tolist(), stops))
    golden(name, alone)
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, return_token_type_ids=False)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    got = ours(shared, name)
    assert [c.ids for c in got] == alone
    assert [c.ids for c in got] == [cut(ids, stops) for ids in together]
    assert [c.finished for c in got] == [ids[-1] in stops for ids in alone]


@torch.no_grad()
def test_filters_are_transformers():
    """Top-k and top-p keep the tokens that transformers' warpers keep, in its order."""
    import numpy as np
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from jaxalign.rollout.sampling import keep_top_k, keep_top_p

    logits = np.random.default_rng(0).normal(0, 3, (50, 97)).astype(np.float32)
    for k, p, temperature in ((5, 0.9, 1.0), (40, 0.5, 0.7), (1, 0.99, 1.3), (97, 0.05, 1.0)):
        theirs = torch.tensor(logits)
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
            theirs = warper(None, theirs)
        mine = keep_top_p(keep_top_k(logits / np.float32(temperature), k), p)
        np.testing.assert_array_equal(np.isfinite(mine), torch.isfinite(theirs).numpy())
