"""Llama (arXiv 2302.13971, 2407.21783), and every model that says it is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.family import Family
from jaxalign.models.hf_fields import flag, heads, integer, number, rope
from jaxalign.models.hf_names import Names, Row

_HONOURED = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias is_llama_config
"""
_LAYER = "model.layers.{layer}."


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim = heads(hf)
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "num_layers": integer(hf, "num_hidden_layers"),
        "embed_dim": integer(hf, "hidden_size"),
        "mlp_dim": integer(hf, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": number("rms_norm_eps", hf.get("rms_norm_eps"), 1e-6),
        "rope": rope(hf),
        "tied": flag(hf, "tie_word_embeddings"),
        "attention_bias": flag(hf, "attention_bias"),
        "mlp_bias": flag(hf, "mlp_bias"),
        "initializer_range": number("initializer_range", hf.get("initializer_range"), 0.02),
    }


FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    architectures={"lm": "LlamaForCausalLM", "score": "LlamaForSequenceClassification"},
    fields=_fields,
    honoured=frozenset(_HONOURED.split()),
    neutral={"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, None)},
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
        # Keys of old files that hold nothing trained: tables that are computed, masks that are constants.
        harmless=(r".*rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias", r".*\.masked_bias"),
    ),
)
