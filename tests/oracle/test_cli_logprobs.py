"""`jaxalign logprobs` and `jaxalign score` against transformers on the shared models."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.cases import LINES, make_reward, run, write_lines

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "cli_logprobs.json"


def keep(name, values):
    """Writes a golden value, for the default tests."""
    if os.environ.get("JAXALIGN_UPDATE_GOLDEN") == "1":
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**golden, name: values}, indent=1, sort_keys=True) + "\n")


def ids(tokenizer, prompt, completion, separate=False):
    """Prompt and completion as tokens: of one text, cut where the last token ends that lies within the prompt."""
    if separate:
        return tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + completion, return_offsets_mapping=True)
    cut = sum(1 for _, end in whole["offset_mapping"] if end <= len(prompt))
    return whole["input_ids"][:cut], whole["input_ids"][cut:]


@torch.no_grad()
def torch_logprobs(path, separate=False):
    """Each line alone, in eager attention, float32."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    sums, counts = [], []
    for prompt, completion in LINES:
        before, after = ids(tokenizer, prompt, completion, separate)
        logits = model(torch.tensor([before + after])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        sums.append(float(sum(logp[len(before) - 1 + k, t] for k, t in enumerate(after))))
        counts.append(len(after))
    return sums, counts


@pytest.mark.parametrize("name", ["stories260k-llama", "stories3m-llama"])
def test_logprobs_equal_transformers(shared, tmp_path, name):
    path = shared / "models" / name
    sums, counts = torch_logprobs(path)
    keep(name, {"sums": sums, "counts": counts})
    ours = run("logprobs", "--model", str(path), "--data", write_lines(tmp_path / "d.jsonl"))
    assert [line["num_tokens"] for line in ours] == counts
    np.testing.assert_allclose([line["sum_logprob"] for line in ours], sums, rtol=1e-5, atol=1e-4)


def test_tokenised_apart(shared, tmp_path):
    path = shared / "models" / "stories3m-llama"
    sums, counts = torch_logprobs(path, separate=True)
    ours = run("logprobs", "--model", str(path), "--separate", "--data", write_lines(tmp_path / "d.jsonl"))
    assert [line["num_tokens"] for line in ours] == counts
    np.testing.assert_allclose([line["sum_logprob"] for line in ours], sums, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_scores_equal_transformers(shared, tmp_path):
    reward = make_reward(shared / "models" / "stories260k-llama", tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(reward)
    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    lines = [before + after for before, after in (ids(tokenizer, *line) for line in LINES)]
    theirs = [float(model(torch.tensor([line])).logits[0, 0]) for line in lines]
    keep("scores", theirs)
    ours = run("score", "--model", reward, "--data", write_lines(tmp_path / "d.jsonl"))
    np.testing.assert_allclose([line["score"] for line in ours], theirs, rtol=1e-4, atol=1e-5)
    # The same in transformers' own batch, padded: its pooling finds the last real token of our export.
    width, pad = max(map(len, lines)), model.config.pad_token_id
    batch = torch.tensor([line + [pad] * (width - len(line)) for line in lines])
    mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines])
    pooled = model(batch, attention_mask=mask).logits[:, 0]
    np.testing.assert_allclose([line["score"] for line in ours], pooled.numpy(), rtol=1e-4, atol=1e-5)


def test_implicit_reward_is_beta_times_the_difference(shared, tmp_path):
    data = write_lines(tmp_path / "d.jsonl")
    base = shared / "models" / "stories260k-llama"
    policy = tmp_path / "policy"
    shutil.copytree(base, policy)
    tensors = load_file(policy / "model.safetensors")
    # A policy that differs: every weight of the last norm a little larger.
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.1)
    os.chmod(policy / "model.safetensors", 0o644)
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    expected = 0.2 * (np.array(torch_logprobs(policy)[0]) - np.array(torch_logprobs(base)[0]))
    ours = run("score", "--model", str(policy), "--ref", str(base), "--beta", "0.2", "--data", data)
    np.testing.assert_allclose([line["score"] for line in ours], expected, rtol=1e-4, atol=2e-4)
    assert np.abs(expected).max() > 0.1
