"""SmolLM3 (huggingface.co/blog/smollm3): Llama whose queries and keys do not turn in every fourth layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.families import llama
from jaxalign.models.hf_fields import WINDOWS, decoder, window_of, windows
from jaxalign.models.hf_values import flag, integer, wrong

# Of transformers' SmolLM3Config, where a file does not say.
_NUM_KV_HEADS, _THETA, _INTERVAL = 4, 2e6, 4
_TURNS, _EVERY, _USE_WINDOW = "no_rope_layers", "no_rope_layer_interval", "use_sliding_window"


def _turns(hf: Mapping[str, Any]) -> list[bool]:
    """Whether each layer's queries and keys turn: 1 says yes, in a field of that name."""
    layers, interval, stated = integer(hf, "num_hidden_layers"), integer(hf, _EVERY, _INTERVAL), hf.get(_TURNS)
    if stated is None:
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(stated, list) or len(stated) < layers or not all(turn in (0, 1) for turn in stated):
        raise wrong(_TURNS, stated, f"{layers} of 1, for a layer with a rotary embedding, and 0")
    return [bool(turn) for turn in stated[:layers]]


def _fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    turns = _turns(hf)
    window = window_of(hf, None) if flag(hf, _USE_WINDOW) else None
    fields = decoder(hf, num_kv_heads=_NUM_KV_HEADS, rope_theta=_THETA)
    return fields | {
        "tied": flag(hf, "tie_word_embeddings", True),
        "attention_bias": flag(hf, "attention_bias"),
        "mlp_bias": flag(hf, "mlp_bias"),
        "ropes": tuple(fields["rope"] if turn else None for turn in turns),
        "windows": windows(hf, window, lambda layer: not turns[layer]),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="SmolLM3",
    model_types=("smollm3",),
    architectures={
        "lm": "SmolLM3ForCausalLM",
        "score": "SmolLM3ForSequenceClassification",
        "tokens": "SmolLM3ForTokenClassification",
    },
    fields=_fields,
    # Nothing reads `max_window_layers`.
    honoured=llama.FAMILY.honoured | WINDOWS | {_TURNS, _EVERY, _USE_WINDOW, "max_window_layers"},
)
