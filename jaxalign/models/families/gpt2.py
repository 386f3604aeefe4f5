"""GPT-2 (Radford et al. 2019), and DistilGPT2: a table of positions, layer norms, matrices with the inputs first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families.gpt_neox import layered
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import decoder
from jaxalign.models.hf_names import Names, Row
from jaxalign.models.hf_values import flag, integer, number

_HONOURED = """
    vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon scale_attn_weights
    tie_word_embeddings
"""
# Dropout is none here, as in every family; the rest is of other heads, of the order of rounding, or read by nothing.
_UNREAD = """
    attn_pdrop embd_pdrop resid_pdrop n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout
"""
_LAYER = "transformer.h.{layer}."
_QKV = _LAYER + "attn.c_attn."


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    embed_dim, layers = integer(hf, "n_embd"), integer(hf, "n_layer")
    sizes = {"hidden_size": embed_dim, "num_hidden_layers": layers, "num_attention_heads": integer(hf, "n_head")}
    sizes["intermediate_size"] = integer(hf, "n_inner", 4 * embed_dim)
    scaled = flag(hf, "scale_attn_weights", True)
    return decoder({name: hf.get(name) for name in ("vocab_size", "initializer_range")} | sizes) | {
        **layered({"activation_function": "gelu_new", **hf}, "activation_function"),
        "norm_eps": number("layer_norm_epsilon", hf.get("layer_norm_epsilon"), 1e-5),
        "tied": flag(hf, "tie_word_embeddings", True),
        "attention_bias": True,
        "attention_scale": None if scaled else 1.0,
        "num_positions": integer(hf, "n_positions", 1024),
        "ropes": (None,) * layers,
    }


FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    architectures={"lm": "GPT2LMHeadModel", "score": "GPT2ForSequenceClassification"},
    fields=_fields,
    honoured=frozenset({*_HONOURED.split(), *_UNREAD.split()}),
    neutral={},
    names=Names(
        Row("transformer.wte.weight", "embed/embedding", "VD -> VD"),
        Row("transformer.wpe.weight", "embed/positions", "PD -> PD"),
        Row(_LAYER + "ln_1.weight", "layers/attention_norm/scale", "D -> D"),
        Row(_LAYER + "ln_1.bias", "layers/attention_norm/bias", "D -> D"),
        Row(_QKV + "weight", "layers/attention/query/kernel", "D(NH) -> DNH", along=1),
        Row(_QKV + "weight", "layers/attention/key/kernel", "D(KH) -> DKH", along=1),
        Row(_QKV + "weight", "layers/attention/value/kernel", "D(KH) -> DKH", along=1),
        Row(_QKV + "bias", "layers/attention/query/bias", "(NH) -> NH"),
        Row(_QKV + "bias", "layers/attention/key/bias", "(KH) -> KH"),
        Row(_QKV + "bias", "layers/attention/value/bias", "(KH) -> KH"),
        Row(_LAYER + "attn.c_proj.weight", "layers/attention/out/kernel", "(NH)D -> NHD"),
        Row(_LAYER + "attn.c_proj.bias", "layers/attention/out/bias", "D -> D"),
        Row(_LAYER + "ln_2.weight", "layers/mlp_norm/scale", "D -> D"),
        Row(_LAYER + "ln_2.bias", "layers/mlp_norm/bias", "D -> D"),
        Row(_LAYER + "mlp.c_fc.weight", "layers/mlp/up/kernel", "DF -> DF"),
        Row(_LAYER + "mlp.c_fc.bias", "layers/mlp/up/bias", "F -> F"),
        Row(_LAYER + "mlp.c_proj.weight", "layers/mlp/down/kernel", "FD -> FD"),
        Row(_LAYER + "mlp.c_proj.bias", "layers/mlp/down/bias", "D -> D"),
        Row("transformer.ln_f.weight", "norm/scale", "D -> D"),
        Row("transformer.ln_f.bias", "norm/bias", "D -> D"),
        Row("lm_head.weight", "lm_head/kernel", "VD -> DV"),
        Row("score.weight", "score/kernel", "OD -> DO"),
        harmless=(r".*\.attn\.(masked_)?bias",),  # masks that old files hold
        other=((r"((wte|wpe|ln_f|h)\..*)", r"transformer.\1"),),  # the first files have no prefix
    ),
)
