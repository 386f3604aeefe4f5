"""What a layer receives beside the tokens' vectors: one structure, whatever the layers are run for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxalign.models.cache import Seen
from jaxalign.types import CausalByIndex, Rows

KeysValues = tuple[jax.Array, jax.Array]  # of a layer, [B, K, S, H] each
Rotation = tuple[jax.Array, jax.Array]  # cosine and sine of each token's angles, [B, T, H / 2]


class LayerInputs(NamedTuple):
    """What every layer receives; `seen` and `numbers` are its own, the rest is the same for all."""

    rotations: tuple[Rotation | None, ...]  # of which `ropes.of_layer` is the layer's own
    rows: Rows  # [B, T]
    numbers: dict[str, jax.Array]  # the layer's own, such as a window; of all layers [L], which ride in the scan
    slots: jax.Array | None = None  # int32 [B, S], how intervals count each token; None: in their order
    seen: Seen | None = None  # keys and values of earlier tokens
    queries: jax.Array | None = None  # int32 [B, M], the query tokens, which have a result; None: all of them
    backend: str | None = None  # of attention, where one is asked for
    window: int | None = None  # of every layer; windows that differ are `numbers`

    @property
    def causal(self) -> bool:
        """Whether no query token sees a key that comes after it, where there are as many of both."""
        return self.queries is None and (self.slots is not None or isinstance(self.rows.causal, CausalByIndex))

    def of_layer(self, numbers: dict[str, Any]) -> LayerInputs:
        """The same with one layer's own numbers."""
        return self._replace(numbers=numbers)


class Queries(NamedTuple):
    """The query tokens of a layer."""

    x: jax.Array  # [B, M, D], after the norm
    rotation: Rotation | None  # of the query tokens; None: they do not turn
    rows: Rows  # [B, M]; the intervals are of the keys
