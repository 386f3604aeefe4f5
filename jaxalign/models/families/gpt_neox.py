"""GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): layer norms, and attention and mlp side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.family import Family
from jaxalign.models.hf_fields import decoder
from jaxalign.models.hf_names import Names, Row
from jaxalign.models.hf_rope import turned_share
from jaxalign.models.hf_values import flag, number, wrong

# What `hidden_act` is called, and what `ModelConfig.activation` calls it.
ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_SHARE, _THETA, _EPS = "rotary_pct", "rotary_emb_base", "layer_norm_eps"
_HONOURED = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rope_scaling rope_parameters
    tie_word_embeddings hidden_act use_parallel_residual attention_bias
"""
_LAYER = "gpt_neox.layers.{layer}."
_QKV = _LAYER + "attention.query_key_value."


def layered(hf: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """The fields of models with layer norms, biases everywhere and mlps without a gate.

    Args:
      hf: the parsed `config.json`.
      activation: the field that names it.
    """
    if (kind := hf.get(activation)) not in ACTIVATIONS:
        raise wrong(activation, kind, f"one of {', '.join(ACTIVATIONS)}")
    return {"norm": "layer", "plain_mlp": True, "activation": ACTIVATIONS[kind], "mlp_bias": True}


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    own = {**hf, "rope_theta": hf.get(_THETA)}
    return decoder(own, turned=turned_share(hf, _SHARE, 0.25)) | {
        **layered({"hidden_act": "gelu", **hf}, "hidden_act"),
        "norm_eps": number(_EPS, hf.get(_EPS), 1e-5),
        "attention_bias": flag(hf, "attention_bias", True),
        "parallel": flag(hf, "use_parallel_residual", True) or None,
    }


FAMILY = Family(
    name="GPT-NeoX, Pythia",
    model_types=("gpt_neox",),
    architectures={"lm": "GPTNeoXForCausalLM", "score": "GPTNeoXForSequenceClassification"},
    fields=_fields,
    honoured=frozenset({*_HONOURED.split(), _SHARE, _THETA, _EPS}),
    neutral={},
    names=Names(
        Row("gpt_neox.embed_in.weight", "embed/embedding", "VD -> VD"),
        Row(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
        Row(_LAYER + "input_layernorm.bias", "layers/attention_norm/bias", "D -> D"),
        Row(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        Row(_LAYER + "post_attention_layernorm.bias", "layers/mlp_norm/bias", "D -> D"),
        # Head by head: its query, its key, its value.
        Row(_QKV + "weight", "layers/attention/query/kernel", "NHD -> DNH", along=1, merged=2),
        Row(_QKV + "weight", "layers/attention/key/kernel", "KHD -> DKH", along=1, merged=2),
        Row(_QKV + "weight", "layers/attention/value/kernel", "KHD -> DKH", along=1, merged=2),
        Row(_QKV + "bias", "layers/attention/query/bias", "NH -> NH", along=1, merged=2),
        Row(_QKV + "bias", "layers/attention/key/bias", "KH -> KH", along=1, merged=2),
        Row(_QKV + "bias", "layers/attention/value/bias", "KH -> KH", along=1, merged=2),
        Row(_LAYER + "attention.dense.weight", "layers/attention/out/kernel", "D(NH) -> NHD"),
        Row(_LAYER + "attention.dense.bias", "layers/attention/out/bias", "D -> D"),
        Row(_LAYER + "mlp.dense_h_to_4h.weight", "layers/mlp/up/kernel", "FD -> DF"),
        Row(_LAYER + "mlp.dense_h_to_4h.bias", "layers/mlp/up/bias", "F -> F"),
        Row(_LAYER + "mlp.dense_4h_to_h.weight", "layers/mlp/down/kernel", "DF -> FD"),
        Row(_LAYER + "mlp.dense_4h_to_h.bias", "layers/mlp/down/bias", "D -> D"),
        Row("gpt_neox.final_layer_norm.weight", "norm/scale", "D -> D"),
        Row("gpt_neox.final_layer_norm.bias", "norm/bias", "D -> D"),
        Row("embed_out.weight", "lm_head/kernel", "VD -> DV"),
        Row("score.weight", "score/kernel", "OD -> DO"),
        # Masks and tables that old files hold.
        harmless=(r".*\.attention\.(masked_)?bias", r".*rotary_emb\.\w+"),
        other=((r"lm_head\.weight", "embed_out.weight"),),  # as transformers 5 calls it
    ),
)
