"""Llama (arXiv 2302.13971, 2407.21783), and every model that says it is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, decoder
from jaxalign.models.hf_names import Names, Row
from jaxalign.models.hf_values import flag

_LAYER = "model.layers.{layer}."


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder(hf) | {"attention_bias": flag(hf, "attention_bias"), "mlp_bias": flag(hf, "mlp_bias")}


FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    architectures={
        "lm": "LlamaForCausalLM",
        "score": "LlamaForSequenceClassification",
        "tokens": "LlamaForTokenClassification",
    },
    fields=_fields,
    honoured=DECODER | {"attention_bias", "mlp_bias", "is_llama_config"},
    neutral=NEUTRAL,
    names=Names(
        Row("model.embed_tokens.weight", "embed/embedding", "VD -> VD"),
        Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
        Row(_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "(NH)D -> DNH"),
        Row(_LAYER + "self_attn.q_proj.bias", "layers/attention/query/bias", "(NH) -> NH"),
        Row(_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "(KH)D -> DKH"),
        Row(_LAYER + "self_attn.k_proj.bias", "layers/attention/key/bias", "(KH) -> KH"),
        Row(_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "(KH)D -> DKH"),
        Row(_LAYER + "self_attn.v_proj.bias", "layers/attention/value/bias", "(KH) -> KH"),
        Row(_LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "D(NH) -> NHD"),
        Row(_LAYER + "self_attn.o_proj.bias", "layers/attention/out/bias", "D -> D"),
        Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        Row(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "FD -> DF"),
        Row(_LAYER + "mlp.gate_proj.bias", "layers/mlp/gate/bias", "F -> F"),
        Row(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "FD -> DF"),
        Row(_LAYER + "mlp.up_proj.bias", "layers/mlp/up/bias", "F -> F"),
        Row(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "DF -> FD"),
        Row(_LAYER + "mlp.down_proj.bias", "layers/mlp/down/bias", "D -> D"),
        Row("model.norm.weight", "norm/scale", "D -> D"),
        Row("lm_head.weight", "lm_head/kernel", "VD -> DV"),
        Row("score.weight", "score/kernel", "OD -> DO"),
        Row("score.bias", "score/bias", "O -> O"),
        # Keys of old files that hold nothing trained: tables that are computed, masks that are constants.
        harmless=(r".*rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias", r".*\.masked_bias"),
    ),
)
