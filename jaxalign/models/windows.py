"""Sliding windows: which keys a layer sees, as an interval where that says it all, else by positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.cache import ring_columns
from jaxalign.models.layer_inputs import LayerInputs
from jaxalign.types import CausalByIndex, Rows

_NUMBER = "window"  # in `LayerInputs.numbers`
_ALL = 1 << 30  # the window of a layer without one, beside layers that have one


class VisibleKeys(NamedTuple):
    """What attention is told of the keys that each query sees; the names are its arguments."""

    start_BT: jax.Array
    end_BT: jax.Array
    window: int | jax.Array | None = None
    positions: tuple[jax.Array, jax.Array] | None = None
    slots_BS: jax.Array | None = None


def of_layers(windows: tuple[int | None, ...] | None, num_keys: int) -> tuple[int | None, dict[str, Any]]:
    """The window of all layers, or the number of each.

    A window as long as the row, or as a cache, leaves nothing out: positions of one row differ by less.

    Args:
      windows: of the layers; None: of none.
      num_keys: S.

    Returns:
      The one window or None, and `LayerInputs.numbers`.

    >>> of_layers((4, 4), 100), of_layers((4, None), 4)
    ((4, {}), (None, {}))
    >>> of_layers((4, None), 5)[1]["window"].tolist()
    [4, 1073741824]
    """
    short = {None if w is None or w >= num_keys else w for w in windows or ()}
    if len(short) > 1:
        return None, {_NUMBER: np.array([_ALL if w is None else w for w in windows or ()], np.int32)}
    return (short or {None}).pop(), {}


def visible_keys(given: LayerInputs, queries: Rows, num_keys: int) -> VisibleKeys:
    """The keys that query tokens see in a layer.

    Where indices count as positions do, in rows that promise it and in a cache, whose rows lie without gaps, a window
    only moves the start of the interval, and every backend can do it. In other rows, such as pairs that share their
    prompt, keys that are near enough are no interval: attention compares positions.

    Args:
      given: what the layer receives, with its own numbers.
      queries: of the query tokens [B, M].
      num_keys: S.
    """
    start, end = queries.attend_start, queries.attend_end
    if given.seen is not None and given.seen.ring:  # which holds the window alone
        return VisibleKeys(start, end, slots_BS=ring_columns(end, num_keys))
    window = given.numbers.get(_NUMBER, given.window)
    if isinstance(window, np.integer):  # of layers that run one by one
        window = int(window) if window < num_keys else None
    if window is None:
        return VisibleKeys(start, end, slots_BS=given.slots)
    if given.seen is None and not isinstance(given.rows.causal, CausalByIndex):
        return VisibleKeys(start, end, window, (queries.positions, given.rows.positions), given.slots)
    index = jnp.arange(queries.positions.shape[1], dtype=jnp.int32) if given.queries is None else given.queries
    if given.seen is not None:
        index = given.seen.index + index
    return VisibleKeys(jnp.maximum(start, index - window + 1), end, slots_BS=given.slots)
