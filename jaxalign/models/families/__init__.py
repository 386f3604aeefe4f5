"""The families of models that can be read and written, one file each; nothing else names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    ministral,
    ministral3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from jaxalign.models.family import Family
from jaxalign.models.hf_values import shown

FAMILIES: list[Family] = [
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    ministral3.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    smollm3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    granite.FAMILY,
    gpt_neox.FAMILY,
    gpt2.FAMILY,
]

_EXPERTS = "a mixture of experts, and jaxalign's layers are dense"
_HYBRID = "layers of linear attention or a recurrence, and jaxalign's are softmax attention"
_VISION = "a text model beside an encoder of images or sound, and jaxalign reads text models"
_ALIBI = "positions as biases of the scores (ALiBi), and jaxalign's are rotary"
_LAYOUT = "another layer than jaxalign's one transformer has yet"

_QWEN = "a dense Qwen3 or Qwen2.5: --config.model.path=Qwen/Qwen3-8B"
_MISTRAL = "a dense Mistral: --config.model.path=mistralai/Mistral-7B-v0.3"
_LLAMA = "a Llama of its size: --config.model.path=meta-llama/Llama-3.2-3B"

# Families that people have and that do not load, by `model_type`: the reason, and what to take instead.
REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("mixtral", "mistral4", "mistral_large4"), (_EXPERTS, _MISTRAL)),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), (_EXPERTS, _QWEN)),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), (_HYBRID, _QWEN)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (_VISION, _QWEN)),
    **dict.fromkeys(("pixtral",), (_VISION, _MISTRAL)),
    **dict.fromkeys(("gpt_oss", "llama4", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe"), (_EXPERTS, _LLAMA)),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "granitemoehybrid", "olmo_hybrid", "falcon_h1"), (_HYBRID, _LLAMA)),
    **dict.fromkeys(("gemma3n", "gemma4", "llava", "mllama"), (_VISION, _LLAMA)),
    **dict.fromkeys(("bloom", "mpt"), (_ALIBI, _LLAMA)),
    **dict.fromkeys(("phi", "falcon", "olmo", "cohere"), (_LAYOUT, _LLAMA)),
}


def find(hf: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`, by its `model_type`.

    Raises:
      InputError: none of them; with the reason where one is known.
    """
    kind = hf.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    kinds = dict.fromkeys(known for family in FAMILIES for known in (*family.model_types, *family.inside))
    supported = ", ".join(map(repr, kinds))
    reason, nearest = REFUSED.get(str(kind), ("", "--config.model.path=such a checkpoint"))
    found = f"model_type {shown(kind)} in config.json"
    raise InputError(f"{found}: {reason}" if reason else found, f"one of {supported}", nearest)
