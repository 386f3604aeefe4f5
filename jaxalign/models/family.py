"""What a family of models is: how its `config.json` and its tensors say what the one transformer calls otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.models.hf_names import Names


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that is known of one family; see `families/` for the ones there are."""

    name: str  # as people write it
    model_types: tuple[str, ...]  # of `config.json`
    # The classes of transformers: "lm", "score", and where there is one, "tokens" that classifies tokens.
    architectures: Mapping[str, str]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]  # a parsed config.json to fields of `ModelConfig`
    honoured: frozenset[str]  # the fields of config.json that `fields` reads, and those that change nothing
    neutral: Mapping[str, tuple]  # values at which a field that is not honoured changes nothing
    names: Names  # of its tensors
    # Checkpoints with an encoder of images whose text part it may be: their class, by their `model_type`.
    inside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only_here: frozenset[str] = frozenset()  # heads for which transformers has no class: jaxalign alone loads an export
