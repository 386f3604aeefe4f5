"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115), and Qwen1.5: biases of queries, keys and values alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, WINDOWS, decoder, window_of, windows
from jaxalign.models.hf_values import flag, whole_number

# Of transformers' Qwen2Config and Qwen3Config, where a file does not say.
NUM_KV_HEADS, WINDOW, FIRST = 32, 4096, 28
HONOURED = DECODER | WINDOWS | {"use_sliding_window", "max_window_layers"}


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    """The windows of the layers from `max_window_layers` on, or by `layer_types`, where they are in use."""
    window = window_of(hf, WINDOW) if flag(hf, "use_sliding_window") else None
    first = whole_number(hf, "max_window_layers", FIRST)
    return windows(hf, window, lambda layer: layer >= first)


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder(hf, num_kv_heads=NUM_KV_HEADS) | {
        "attention_bias": True,
        "output_bias": False,
        "windows": layer_windows(hf),
    }


FAMILY = Family(
    name="Qwen2, Qwen2.5",
    model_types=("qwen2",),
    architectures={
        "lm": "Qwen2ForCausalLM",
        "score": "Qwen2ForSequenceClassification",
        "tokens": "Qwen2ForTokenClassification",
    },
    fields=_fields,
    honoured=HONOURED,
    neutral=NEUTRAL,
    names=llama.FAMILY.names,
)
