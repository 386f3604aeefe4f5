"""Values in a Hugging Face `config.json`, each read with a check of its type and size."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.hub import CONFIG

# Beyond these a number is a mistake: the shapes of such a model alone would take hours.
_MOST: Mapping[str, int] = {
    "vocab_size": 1 << 28,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "sliding_window": 1 << 30,
    "max_position_embeddings": 1 << 40,
}

FULL, SLIDING = "full_attention", "sliding_attention"  # `layer_types`


def token_ids(hf: Mapping[str, Any], name: str, file: str = CONFIG) -> list[int]:
    """The ids in a field that holds one, several, or null.

    Raises:
      InputError: something else is there.
    """
    value = hf.get(name)
    found = value if isinstance(value, list) else [value]
    ids = [i for i in found if i is not None]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise InputError(
            f"{name} is {shown(value)} in {file}",
            "a token id, a list of them, or null",
            f"the checkpoint's own {file}",
        )
    return [i for i in ids if i >= 0]  # files of old say -1 for none


def wrong(name: str, value: Any, expected: str) -> InputError:
    """What is said of a field's value."""
    required = name in _MOST
    return InputError(
        f"{name} is {shown(value)} in config.json",
        expected,
        "the checkpoint's own config.json"
        if required
        else f"another checkpoint, or config.json without {name} if it is wrong",
    )


def shown(value: Any) -> str:
    """A value as it is written, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."


def integer(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size, from 1 to what is no mistake; `default` where the field is missing or null."""
    value = hf.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(name, value, "a positive whole number")
    if value > _MOST.get(name, 1 << 40):
        raise wrong(name, value, f"at most {_MOST.get(name, 1 << 40):,}")
    return value


def whole_number(hf: Mapping[str, Any], name: str, default: int) -> int:
    """A count, which may be 0."""
    value = hf.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise wrong(name, value, "a whole number")
    return value


def number(name: str, value: Any, default: float | None) -> float:
    """A positive number."""
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise wrong(name, value, "a positive number")
    return float(value)


def flag(hf: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false; false where the field is null, `default` where it is missing."""
    value = hf.get(name, default)
    if value not in (True, False, None):
        raise wrong(name, value, "true or false")
    return bool(value)
