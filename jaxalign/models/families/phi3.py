"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv 2404.14219, 2412.08905, 2503.01743): Llama's layer under fused names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.families.mistral import one_window
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL, WINDOWS, decoder
from jaxalign.models.hf_names import Row
from jaxalign.models.hf_rope import turned_share

_ORIGINAL, _TYPE = "original_max_position_embeddings", "rope_type"
_TURNED = "partial_rotary_factor"
# Fields of published files that nothing reads at the value they have there.
_UNREAD = {"full_attn_mod": (1, None), "interpolate_factor": (1, None)}
_LAYER = "model.layers.{layer}."
_QKV, _GATE_UP = _LAYER + "self_attn.qkv_proj.weight", _LAYER + "mlp.gate_up_proj.weight"


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same file with its rope's fields as other families have them.

    The original length stands beside them, and the first files call the type `longrope` by other names.
    """
    fields = dict(hf)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(hf.get(name), Mapping) and hf[name]:
            own = dict(hf[name])
            kind = own.pop("type", None)
            own[_TYPE] = own.get(_TYPE) or kind
            if own[_TYPE] in ("su", "yarn"):
                own[_TYPE] = "longrope"
            if own[_TYPE] == "longrope":
                own[_ORIGINAL] = hf.get(_ORIGINAL, 4096)  # which goes before one among them, as in transformers
            fields[name] = own
    return fields


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder(_rope(hf), norm_eps=1e-5, turned=turned_share(hf)) | {"windows": one_window(hf, None)}


FAMILY = Family(
    name="Phi-3, Phi-4",
    model_types=("phi3",),
    architectures={
        "lm": "Phi3ForCausalLM",
        "score": "Phi3ForSequenceClassification",
        "tokens": "Phi3ForTokenClassification",
    },
    fields=_fields,
    honoured=DECODER | WINDOWS | {_ORIGINAL, _TURNED},
    neutral={**NEUTRAL, **_UNREAD},
    names=llama.FAMILY.names.with_rows(
        Row(_QKV, "layers/attention/query/kernel", "(NH)D -> DNH"),
        Row(_QKV, "layers/attention/key/kernel", "(KH)D -> DKH"),
        Row(_QKV, "layers/attention/value/kernel", "(KH)D -> DKH"),
        after="layers/attention_norm/scale",
    ).with_rows(
        Row(_GATE_UP, "layers/mlp/gate/kernel", "FD -> DF"),
        Row(_GATE_UP, "layers/mlp/up/kernel", "FD -> DF"),
        after="layers/mlp_norm/scale",
    ),
)
