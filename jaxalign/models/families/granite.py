"""Granite 3 (huggingface.co/ibm-granite), its dense models: Llama and factors of embeddings, scores, layers, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.family import Family
from jaxalign.models.hf_fields import DECODER, NEUTRAL
from jaxalign.models.hf_values import number

# (field of ours, of the file): each 1 where the file does not say.
_FACTORS = (
    ("embed_scale", "embedding_multiplier"),
    ("attention_scale", "attention_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
)


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    factors = {ours: number(theirs, hf.get(theirs), 1.0) for ours, theirs in _FACTORS}
    return llama.FAMILY.fields(hf) | factors | {"logit_scale": 1 / factors["logit_scale"]}


FAMILY = Family(
    name="Granite 3",
    model_types=("granite",),
    architectures={"lm": "GraniteForCausalLM", "score": "GraniteForSequenceClassification"},
    only_here=frozenset({"score"}),
    fields=_fields,
    honoured=DECODER | {"attention_bias", "mlp_bias", *(theirs for _, theirs in _FACTORS)},
    neutral=NEUTRAL,
    names=llama.FAMILY.names,
)
