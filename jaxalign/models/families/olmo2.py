"""OLMo 2 (arXiv 2501.00656): norms after attention and mlp, queries and keys normalised over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, decoder
from jaxalign.models.hf_names import Row
from jaxalign.models.hf_values import flag

_LAYER = "model.layers.{layer}."


def common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of OLMo 2, and of those after it."""
    return decoder(hf, norm_eps=1e-5) | {
        "attention_bias": flag(hf, "attention_bias"),
        "norms": "after",
        "qk_norm": "projection",
    }


FAMILY = Family(
    name="OLMo 2",
    model_types=("olmo2",),
    architectures={"lm": "Olmo2ForCausalLM", "score": "Olmo2ForSequenceClassification"},
    fields=common,
    honoured=DECODER | {"attention_bias"},
    neutral=NEUTRAL,
    names=llama.FAMILY.names.with_rows(
        Row(_LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "(NH) -> NH"),
        Row(_LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "(KH) -> KH"),
        Row(_LAYER + "post_attention_layernorm.weight", "layers/attention_out_norm/scale", "D -> D"),
        Row(_LAYER + "post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale", "D -> D"),
        after="layers/attention/out/bias",
        without=("layers/attention_norm/scale", "layers/mlp_norm/scale"),
    ),
)
