"""The data of a case: random words of exact lengths, the same for every contender, and the model's files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from harness.cases import Case

BOS, EOS, FIRST_WORD = 1, 2, 8
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<x4>", "<x5>", "<x6>", "<x7>")


def real_lengths(most: int) -> list[int]:
    """Token counts of real records, cut at `most`; shorter ones in proportion where `most` is below 256."""
    with open(Path(__file__).with_name("lengths.json"), encoding="utf-8") as file:
        lengths = np.asarray(json.load(file)["lengths"])
    return np.clip(lengths * min(most / 256, 1.0), 3, most).astype(int).tolist()


def lengths_of(case: Case) -> list[int]:
    """Tokens of each record of a case."""
    count = case.batch * case.batches
    if not case.ragged:
        return [case.length] * count
    if case.task == "generate":  # prompts from half the longest on
        return np.random.default_rng(1).integers(case.prompt // 2, case.prompt + 1, count).tolist()
    lengths = real_lengths(case.length)
    return lengths[: case.batches * case.batch * 2]


def records(case: Case) -> list[dict[str, list[int]]]:
    """Records as token ids, special tokens included.

    Text has BOS and EOS, a pair's completions end by EOS, prompts have neither.
    """
    rng = np.random.default_rng(0)
    words = lambda n: rng.integers(FIRST_WORD, case.shape.vocab, n).tolist()  # noqa: E731
    out = []
    for length in lengths_of(case):
        if case.task == "sft":
            out.append({"ids": [BOS, *words(length - 2), EOS]})
        elif case.task in ("dpo", "reward"):
            prompt = words(case.prompt)
            chosen, rejected = ([*words(case.response - 1), EOS] for _ in range(2))
            out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            out.append({"ids": words(length if case.ragged else case.prompt)})
    return out


def write(case: Case, directory: Path) -> None:
    """Writes `records.json` and `model/`, the config and the tokenizer that every contender reads.

    Generation and PPO get a tokenizer without EOS, so that every completion has all its tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "records.json").write_text(json.dumps(records(case)))
    ends = case.task in ("sft", "dpo", "reward")
    model = directory / "model"
    shutil.rmtree(model, ignore_errors=True)
    _write_tokenizer(model, case.shape.vocab, ends)
    (model / "config.json").write_text(json.dumps(_config(case, ends), indent=1))


def _config(case: Case, ends: bool) -> dict[str, Any]:
    shape = case.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": max(case.length, 2048),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "bos_token_id": BOS,
        "eos_token_id": EOS if ends else None,
        "dtype": "float32",
    }


def _write_tokenizer(directory: Path, vocab: int, ends: bool) -> None:
    """One word is one token: the word of token 17 is w17."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that there is no torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(_SPECIAL)} | {f"w{i}": i for i in range(FIRST_WORD, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "</s>"} if ends else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", **named
    ).save_pretrained(directory)
