"""Mistral (arXiv 2310.06825), Nemo and Small among them: one window for all layers, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, WINDOWS, decoder, window_of, windows
from jaxalign.models.hf_values import wrong

# Of transformers' MistralConfig, where a file does not say.
NUM_KV_HEADS, WINDOW = 8, 4096


def one_window(hf: Mapping[str, Any], default: int | None) -> tuple[int | None, ...] | None:
    """The window of all layers; other `layer_types` are refused: transformers' class does not read them.

    Args:
      hf: the parsed `config.json`.
      default: where the file does not say.
    """
    window = window_of(hf, default)
    found = windows(hf, window)
    if set(found or (None,)) != {window}:
        raise wrong("layer_types", hf["layer_types"], "the same for all layers; others are model_type 'ministral'")
    return found


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder(hf, num_kv_heads=NUM_KV_HEADS) | {"windows": one_window(hf, WINDOW)}


FAMILY = Family(
    name="Mistral",
    model_types=("mistral",),
    architectures={
        "lm": "MistralForCausalLM",
        "score": "MistralForSequenceClassification",
        "tokens": "MistralForTokenClassification",
    },
    fields=_fields,
    honoured=DECODER | WINDOWS,
    neutral=NEUTRAL,
    names=llama.FAMILY.names,
    inside={"mistral3": "Mistral3ForConditionalGeneration"},
)
