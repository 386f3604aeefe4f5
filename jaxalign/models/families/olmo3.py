"""OLMo 3 (arXiv 2512.13961): OLMo 2 with a window in three layers of four, whose rotary embedding is not scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import olmo2
from jaxalign.models.hf_fields import WINDOWS, layer_types, window_of, windows
from jaxalign.models.hf_rope import ropes_by_type
from jaxalign.models.hf_values import FULL, wrong

# Of transformers' Olmo3Config, where a file does not say.
_WINDOW, _THETA, _PATTERN = 4096, 5e5, 4


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    theta = hf.get("rope_theta")
    if hf.get("rope_parameters") is None and theta not in (None, _THETA):
        # Version 4 of transformers takes it for all layers, version 5 for those without a window.
        raise wrong("rope_theta", theta, f"{_THETA:g}, or rope_parameters, which say it of each layer type")
    types = layer_types(hf, lambda layer: (layer + 1) % _PATTERN != 0)
    fields = olmo2.common({**hf, "rope_parameters": None, "rope_scaling": None})
    by_type = ropes_by_type(hf, fields["head_dim"], _THETA, _THETA)
    return fields | {
        "rope": by_type[FULL],
        "ropes": tuple(by_type[kind] for kind in types),
        "windows": windows({**hf, "layer_types": types}, window_of(hf, _WINDOW)),
    }


FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    name="OLMo 3",
    model_types=("olmo3",),
    architectures={"lm": "Olmo3ForCausalLM", "score": "Olmo3ForSequenceClassification"},
    fields=_fields,
    honoured=olmo2.FAMILY.honoured | WINDOWS,
)
