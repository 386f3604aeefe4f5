"""Gemma (arXiv 2403.08295): norms of `1 + scale`, embeddings times sqrt(D), mlps gated by GELU, heads of 256."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, decoder
from jaxalign.models.hf_values import flag

# Of transformers' GemmaConfig, where a file does not say.
NUM_KV_HEADS, HEAD_DIM = 16, 256
_TANH = "gelu_pytorch_tanh"
# "gelu" is what the first files say of the approximation by tanh; transformers takes it so.
NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": (_TANH, "gelu"), "hidden_activation": (_TANH, None), "partial_rotary_factor": (1, None)
}  # fmt: skip


def common(hf: Mapping[str, Any], num_kv_heads: int) -> dict[str, Any]:
    """The fields of every Gemma."""
    fields = decoder(hf, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM)
    return fields | {
        "tied": flag(hf, "tie_word_embeddings", True),
        "attention_bias": flag(hf, "attention_bias"),
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embed_scale": fields["embed_dim"] ** 0.5,
    }


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return common(hf, NUM_KV_HEADS)


FAMILY = Family(
    name="Gemma",
    model_types=("gemma",),
    architectures={
        "lm": "GemmaForCausalLM",
        "score": "GemmaForSequenceClassification",
        "tokens": "GemmaForTokenClassification",
    },
    fields=_fields,
    honoured=DECODER | {"attention_bias"},
    neutral=NEUTRAL,
    names=llama.FAMILY.names,
)
