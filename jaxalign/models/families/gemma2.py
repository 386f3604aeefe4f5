"""Gemma 2 (arXiv 2408.00118): Gemma with capped scores and logits, norms on both sides, a window every other layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import gemma, llama
from jaxalign.models.hf_fields import WINDOWS, window_of, windows
from jaxalign.models.hf_names import Row
from jaxalign.models.hf_values import number

# Of transformers' Gemma2Config, where a file does not say.
NUM_KV_HEADS, WINDOW = 4, 4096
SCALAR, SCORES, LOGITS = "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"
_UNREAD = frozenset({"cache_implementation", "sliding_window_size"})  # of old files; nothing reads them
_LAYER = "model.layers.{layer}."


def cap(hf: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """None where it is null."""
    return None if hf.get(name, default) is None else number(name, hf.get(name), default)


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return gemma.common(hf, NUM_KV_HEADS) | {
        "windows": windows(hf, window_of(hf, WINDOW), lambda layer: layer % 2 == 0),
        "norms": "both",
        "attention_scale": number(SCALAR, hf.get(SCALAR), 256) ** -0.5,
        "attention_softcap": cap(hf, SCORES, 50.0),
        "logit_softcap": cap(hf, LOGITS, 30.0),
    }


FAMILY = dataclasses.replace(
    gemma.FAMILY,
    name="Gemma 2",
    model_types=("gemma2",),
    architectures={
        "lm": "Gemma2ForCausalLM",
        "score": "Gemma2ForSequenceClassification",
        "tokens": "Gemma2ForTokenClassification",
    },
    fields=_fields,
    honoured=gemma.FAMILY.honoured | WINDOWS | _UNREAD | {SCALAR, SCORES, LOGITS},
    names=llama.FAMILY.names.with_rows(
        Row(_LAYER + "post_attention_layernorm.weight", "layers/attention_out_norm/scale", "D -> D"),
        Row(_LAYER + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        Row(_LAYER + "post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale", "D -> D"),
        after="layers/attention/out/bias",
    ),
)
