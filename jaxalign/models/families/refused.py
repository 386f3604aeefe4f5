"""Families that people have and that do not load: why, and the nearest that does."""

from __future__ import annotations

from collections.abc import Mapping

_EXPERTS = "a mixture of experts, and jaxalign's layers are dense"
_HYBRID = "layers of linear attention or a recurrence, and jaxalign's are softmax attention"
_NORMS = "norms, caps or scales that jaxalign does not compute yet"
_VISION = "a text model beside an encoder of images or sound, and jaxalign reads text models"
_ALIBI = "positions as biases of the scores (ALiBi), and jaxalign's are rotary"
_LAYOUT = "another layer than jaxalign's one transformer has yet"

_QWEN = "a dense Qwen3 or Qwen2.5: --config.model.path=Qwen/Qwen3-8B"
_MISTRAL = "a dense Mistral: --config.model.path=mistralai/Mistral-7B-v0.3"
_LLAMA = "a Llama of its size: --config.model.path=meta-llama/Llama-3.2-3B"

# By `model_type`: the reason, and what to take instead.
REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("mixtral", "mistral4", "mistral_large4"), (_EXPERTS, _MISTRAL)),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), (_EXPERTS, _QWEN)),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), (_HYBRID, _QWEN)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (_VISION, _QWEN)),
    **dict.fromkeys(("mistral3", "pixtral"), (_VISION, _MISTRAL)),
    **dict.fromkeys(("gpt_oss", "llama4", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe"), (_EXPERTS, _LLAMA)),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "granitemoehybrid", "olmo_hybrid", "falcon_h1"), (_HYBRID, _LLAMA)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite"), (_NORMS, _LLAMA)),
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4", "llava", "mllama"), (_VISION, _LLAMA)),
    **dict.fromkeys(("bloom", "mpt"), (_ALIBI, _LLAMA)),
    **dict.fromkeys(("phi", "phi3", "gpt2", "gpt_neox", "falcon", "olmo", "smollm3", "cohere"), (_LAYOUT, _LLAMA)),
}
