"""What transformers 5 writes, in words that transformers 4 reads alike: the tokenizer's class, the rope."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxalign.ops.rope import Rope

_SETTINGS = "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"  # both read tokenizer.json as it stands under this name, whatever made it
_NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
_OWN_NOTES = ("backend", "is_local", "local_files_only")  # of the process that saved


def write_old_tokenizer(directory: Path, *, saved: bool) -> None:
    """Makes the tokenizer files of an export loadable by transformers 4.

    The class becomes the generic one: transformers 4 has no `TokenizersBackend`, and both versions build the tokenizers
    of other classes anew, each in its own way, where the generic class takes `tokenizer.json` token for token.

    Args:
      directory: with `tokenizer_config.json`, changed in place.
      saved: written from a loaded tokenizer; else a copy of a source's files, whose class is kept if version 4 has it.
    """
    file = directory / _SETTINGS
    if not file.is_file() or not (directory / "tokenizer.json").is_file():
        return
    settings = json.loads(file.read_text())
    before = dict(settings)
    if saved or settings.get("tokenizer_class") in _NEW_CLASSES:
        settings["tokenizer_class"] = _GENERIC
    if isinstance(settings.get("extra_special_tokens"), list):  # version 4 has a table of names there
        more = settings.pop("extra_special_tokens")
        settings["additional_special_tokens"] = settings.get("additional_special_tokens") or more
    if saved:
        settings = {name: value for name, value in settings.items() if name not in _OWN_NOTES}
    if settings != before:
        file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def old_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 4 reads in place of `rope_parameters`.

    >>> old_rope(Rope("linear", 5e5, 4.0))
    {'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}
    """
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
