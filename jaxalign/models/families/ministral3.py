"""Ministral 3, its text model: yarn, and queries that grow with the position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import mistral
from jaxalign.models.hf_fields import decoder
from jaxalign.models.hf_values import number, wrong

_GROWTH = "llama_4_scaling_beta"
_UNREAD = "max_position_embeddings"  # stands among the rope's fields too, where nothing reads it
# Of transformers' Ministral3Config, where a file does not say.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, _GROWTH: 0.1,
}  # fmt: skip


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    stated = hf.get("rope_parameters")
    rope = dict(stated) if isinstance(stated, Mapping) else dict(_ROPE)
    growth = number(f"rope_parameters.{_GROWTH}", rope.pop(_GROWTH, None), None)
    rope.pop(_UNREAD, None)
    fields = decoder(
        dict(hf) | {"rope_parameters": rope}, num_kv_heads=mistral.NUM_KV_HEADS, head_dim=128, norm_eps=1e-5
    )
    if fields["rope"].kind != "yarn":
        raise wrong("rope_parameters", stated, "rope_type 'yarn', which this family has")
    rotary = dataclasses.replace(fields["rope"], query_growth=growth)
    return fields | {"rope": rotary, "windows": mistral.one_window(hf, None)}


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    name="Ministral 3",
    model_types=("ministral3",),
    architectures={
        "lm": "Ministral3ForCausalLM",
        "score": "Ministral3ForSequenceClassification",
        "tokens": "Ministral3ForTokenClassification",
    },
    fields=_fields,
)
