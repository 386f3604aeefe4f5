"""Qwen3, its dense models (arXiv 2505.09388): queries and keys are normalised head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama, qwen2
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import NEUTRAL, decoder
from jaxalign.models.hf_names import Row
from jaxalign.models.hf_values import flag


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder(hf, num_kv_heads=qwen2.NUM_KV_HEADS, head_dim=128) | {
        "attention_bias": flag(hf, "attention_bias"),
        "qk_norm": "head",
        "windows": qwen2.layer_windows(hf),
    }


FAMILY = Family(
    name="Qwen3",
    model_types=("qwen3",),
    architectures={
        "lm": "Qwen3ForCausalLM",
        "score": "Qwen3ForSequenceClassification",
        "tokens": "Qwen3ForTokenClassification",
    },
    fields=_fields,
    honoured=qwen2.HONOURED | {"attention_bias"},
    neutral=NEUTRAL,
    names=llama.FAMILY.names.with_rows(
        Row("model.layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "H -> H"),
        Row("model.layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "H -> H"),
        after="layers/attention/out/bias",
    ),
)
