"""Gemma 3, its text models (arXiv 2503.19786): queries and keys normalised, five local layers to a global one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import gemma, gemma2
from jaxalign.models.hf_fields import layer_types, window_of, windows
from jaxalign.models.hf_names import Row
from jaxalign.models.hf_rope import LOCAL_THETA, ropes_by_type
from jaxalign.models.hf_values import FULL, integer, number

# Of transformers' Gemma3TextConfig, where a file does not say; the text model of gemma-3-4b states little else.
_DEFAULTS: Mapping[str, Any] = {"vocab_size": 262_208, "num_attention_heads": 8}
_NUM_KV_HEADS, _WINDOW, _PATTERN = 4, 4096, 6
_THETA, _SLIDING_THETA = 1e6, 1e4
_EVERY = "sliding_window_pattern"  # of old files: one layer of so many sees everything


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    hf = {**_DEFAULTS, **hf}
    pattern = integer(hf, _EVERY, _PATTERN)
    types = layer_types(hf, lambda layer: (layer + 1) % pattern != 0)
    fields = gemma.common({**hf, "rope_parameters": None, "rope_scaling": None}, _NUM_KV_HEADS)
    by_type = ropes_by_type(hf, fields["head_dim"], _THETA, _SLIDING_THETA)
    return fields | {
        "rope": by_type[FULL],
        "ropes": tuple(by_type[kind] for kind in types),
        "windows": windows({**hf, "layer_types": types}, window_of(hf, _WINDOW)),
        "norms": "both",
        "qk_norm": "head",
        "attention_scale": number(gemma2.SCALAR, hf.get(gemma2.SCALAR), 256) ** -0.5,
        "logit_softcap": gemma2.cap(hf, gemma2.LOGITS, None),
    }


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    name="Gemma 3",
    model_types=("gemma3_text",),
    architectures={"lm": "Gemma3ForCausalLM", "score": "Gemma3TextForSequenceClassification"},
    fields=_fields,
    honoured=gemma2.FAMILY.honoured - {gemma2.SCORES} | {LOCAL_THETA, _EVERY},
    names=gemma2.FAMILY.names.with_rows(
        Row("model.layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "H -> H"),
        Row("model.layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "H -> H"),
        after="layers/attention/out/bias",
    ),
    inside={"gemma3": "Gemma3ForConditionalGeneration"},
)
