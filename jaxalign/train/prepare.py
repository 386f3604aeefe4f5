"""What a batch of the data stream becomes before it is stepped on: itself, or what was sampled from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.types import Params, TrainState


class Prepared(NamedTuple):
    """What a batch of the data stream has become."""

    state: TrainState
    batches: list[Any]  # one update each
    metrics: dict[str, Any] = {}  # noqa: RUF012
    samples: list[dict[str, Any]] | None = None  # this process's completions; None: nothing was sampled


# (state, frozen, a batch on the mesh) -> Prepared.  All reads of `state` end before it returns: the steps that follow
# take over its memory.
Prepare = Callable[[TrainState, dict[str, Params], Any], Prepared]
