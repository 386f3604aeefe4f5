"""Mistral (arXiv 2310.06825), Nemo and Small among them: one window for all layers, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, WINDOWS, decoder, window_of, windows, wrong

# Of transformers' MistralConfig, where a file does not say.
NUM_KV_HEADS, WINDOW = 8, 4096


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    window = window_of(hf, WINDOW)
    found = windows(hf, window)
    if set(found or (None,)) != {window}:  # transformers' class does not read them
        raise wrong("layer_types", hf["layer_types"], "the same for all layers; others are model_type 'ministral'")
    return decoder(hf, num_kv_heads=NUM_KV_HEADS) | {"windows": found}


FAMILY = Family(
    name="Mistral",
    model_types=("mistral",),
    architectures={"lm": "MistralForCausalLM", "score": "MistralForSequenceClassification"},
    fields=_fields,
    honoured=DECODER | WINDOWS,
    neutral=NEUTRAL,
    names=llama.FAMILY.names,
)
