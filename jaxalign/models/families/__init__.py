"""The families of models that can be read and written, one file each; nothing else names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.families import llama, ministral, mistral, qwen2, qwen3
from jaxalign.models.families.refused import REFUSED
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import shown

FAMILIES: list[Family] = [
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
]


def find(hf: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`, by its `model_type`.

    Raises:
      InputError: none of them; with the reason where one is known.
    """
    kind = hf.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    supported = ", ".join(repr(known) for family in FAMILIES for known in family.model_types)
    reason, nearest = REFUSED.get(str(kind), ("", "--config.model.path=such a checkpoint"))
    found = f"model_type {shown(kind)} in config.json"
    raise InputError(f"{found}: {reason}" if reason else found, f"one of {supported}", nearest)
