"""The quickstart's files, made from a seed: data, a tokenizer trained on it, and a small Llama's config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxalign.examples import world

COUNTS = {"demonstrations": 12_000, "preferences": 8_000, "prompts": 4_000, "heldout": 512}
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.09,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


def write_assets(directory: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the world to `directory`, or leaves it where the same seed wrote it before.

    Held-out prompts and pairs come from other streams of the seed than the training data.

    Args:
      directory: receives `model/` (config.json, tokenizer), `demonstrations.jsonl`, `preferences.jsonl`,
        `preferences_heldout.jsonl`, `prompts.jsonl` and `prompts_heldout.jsonl`.
      seed: the seed of everything in it.

    Returns:
      The directory.
    """
    directory = Path(directory)
    stamp = directory / "world.json"
    wanted = {"seed": seed, "counts": COUNTS, "model": _LLAMA}
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return directory
    (directory / "model").mkdir(parents=True, exist_ok=True)
    demonstrations = world.demonstrations(COUNTS["demonstrations"], seed)
    _write_lines(directory / "demonstrations.jsonl", demonstrations)
    _write_lines(directory / "demonstrations_heldout.jsonl", world.demonstrations(COUNTS["heldout"], seed + 1))
    _write_lines(directory / "preferences.jsonl", world.preferences(COUNTS["preferences"], seed))
    _write_lines(directory / "preferences_heldout.jsonl", world.preferences(COUNTS["heldout"], seed + 1))
    _write_lines(directory / "prompts.jsonl", world.prompts(COUNTS["prompts"], seed))
    _write_lines(directory / "prompts_heldout.jsonl", world.prompts(COUNTS["heldout"], seed + 1))
    vocab_size = _write_tokenizer(directory / "model", (d["prompt"] + d["completion"] for d in demonstrations[:4000]))
    (directory / "model" / "config.json").write_text(json.dumps({**_LLAMA, "vocab_size": vocab_size}, indent=2))
    stamp.write_text(json.dumps(wanted))
    return directory


def _write_lines(path: Path, records: Iterable[Mapping]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_tokenizer(directory: Path, texts: Iterable[str]) -> int:
    """Trains a byte-level BPE on `texts`; returns the vocabulary's size, a multiple of 64."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    return -(-tokenizer.get_vocab_size() // 64) * 64
