"""Ministral: Mistral with a window for some of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import mistral
from jaxalign.models.hf_fields import decoder, window_of, windows


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    own = windows(hf, window_of(hf, mistral.WINDOW))
    return decoder(hf, num_kv_heads=mistral.NUM_KV_HEADS) | {"windows": own}


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    name="Ministral",
    model_types=("ministral",),
    architectures={
        "lm": "MinistralForCausalLM",
        "score": "MinistralForSequenceClassification",
        "tokens": "MinistralForTokenClassification",
    },
    fields=_fields,
)
