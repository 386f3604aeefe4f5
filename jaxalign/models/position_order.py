"""Rows sorted by position, so that attention is causal.

A pair lies around the prompt that it shares, so that its chosen answer, reversed, sees what comes after it. By position
the same row is causal, and attention that may rely on that leaves out the keys behind its queries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Rows


class Ordered(NamedTuple):
    """Rows by position; their intervals count the tokens as they stood."""

    rows: Rows
    slots: jax.Array  # int32 [B, T], where each token stood
    places: jax.Array  # int32 [B, T], where the token that stood at each index has gone


def by_position(rows: Rows) -> Ordered:
    """Sorts each row's tokens by position; those of one position stay in their order.

    Args:
      rows: [B, T].

    >>> pair = [8, 7, 5, 9], [2, 1, 0, 1], [0, 1, 2, 2], [3, 3, 3, 4]  # prompt 5, chosen 7 8, rejected 9
    >>> ordered = by_position(Rows(*(jnp.array([x]) for x in pair)))
    >>> ordered.rows.tokens.tolist(), ordered.slots.tolist(), ordered.places.tolist()
    ([[5, 7, 9, 8]], [[2, 1, 3, 0]], [[3, 1, 0, 2]])
    """
    slots = jnp.argsort(rows.positions, axis=1, stable=True).astype(jnp.int32)
    places = jnp.argsort(slots, axis=1).astype(jnp.int32)
    return Ordered(Rows(*(jnp.take_along_axis(jnp.asarray(x), slots, axis=1) for x in rows)), slots, places)
