"""Rows sorted by position, so that attention is causal.

A pair is laid out as reversed(chosen) + prompt + rejected, so a chosen token attends to later row indices. Sorted by
position the same row is causal, and attention skips the keys after each block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.attention import choose_backend
from jaxalign.ops.attention_short import fits
from jaxalign.ops.readout import take_sources
from jaxalign.types import CausalByPosition, Rows

Run = Callable[[Rows, jax.Array | None, jax.Array | None], jax.Array]  # rows, slots, sources -> hidden states


class Ordered(NamedTuple):
    """Rows by position; their intervals count the tokens as they stood."""

    rows: Rows
    slots: jax.Array  # int32 [B, T], where each token stood
    places: jax.Array  # int32 [B, T], where the token that stood at each index has gone


def pays(rows: Rows, num_heads: int, dtype: Any, asked: str | None) -> bool:
    """Whether rows go through the layers by position: they promise it, and their attention leaves keys out then."""
    B, T = rows.tokens.shape
    if not isinstance(rows.causal, CausalByPosition) or not fits(B, T, T, num_heads):
        return False
    return choose_backend(T, T, dtype, causal=True, asked=asked) == "causal"


def by_position(run: Run) -> Run:
    """`run` over the same rows sorted by position; what is read comes in the order that was asked for."""

    def ordered(rows: Rows, slots: jax.Array | None, sources: jax.Array | None) -> jax.Array:
        rows, slots, places = sort_rows(rows)
        return run(rows, slots, places if sources is None else take_sources(places, sources))

    return ordered


def sort_rows(rows: Rows) -> Ordered:
    """Sorts each row's tokens by position; those of one position stay in their order.

    Args:
      rows: [B, T].

    >>> pair = [8, 7, 5, 9], [2, 1, 0, 1], [0, 1, 2, 2], [3, 3, 3, 4]  # prompt 5, chosen 7 8, rejected 9
    >>> ordered = sort_rows(Rows(*(jnp.array([x]) for x in pair)))
    >>> ordered.rows.tokens.tolist(), ordered.slots.tolist(), ordered.places.tolist()
    ([[5, 7, 9, 8]], [[2, 1, 3, 0]], [[3, 1, 0, 2]])
    """
    slots = jnp.argsort(rows.positions, axis=1, stable=True).astype(jnp.int32)
    places = jnp.argsort(slots, axis=1).astype(jnp.int32)
    return Ordered(jax.tree.map(lambda x: jnp.take_along_axis(jnp.asarray(x), slots, axis=1), rows), slots, places)
