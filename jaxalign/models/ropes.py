"""Rotary embeddings: one for all layers, or a few of which each layer has one or none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.layer_inputs import LayerInputs, Rotation
from jaxalign.ops.rope import Rope, frequencies, rotations

_NUMBER = "rotation"  # in `LayerInputs.numbers`, counts `LayerInputs.rotations`


def of_layers(
    ropes: tuple[Rope | None, ...], positions: jax.Array, num_keys: int, head_dim: int, dtype: Any
) -> tuple[tuple[Rotation | None, ...], dict[str, Any]]:
    """The rotations that there are, and the number of each layer's.

    All are made once, before the layers: a layer that made its own would compute sines, and again in the backward pass.

    Args:
      ropes: of each layer, None for a layer whose queries and keys do not turn; or the one of all layers.
      positions: int32 [B, T].
      num_keys: S.
      head_dim: H.
      dtype: of the computation.

    Returns:
      `LayerInputs.rotations` and `LayerInputs.numbers`.

    Raises:
      ValueError: frequencies depend on the longest sequence, and none is stated.
    """
    check_stated(ropes, num_keys)
    kinds = tuple(dict.fromkeys(ropes))
    made = tuple(None if rope is None else _made(rope, positions, head_dim, dtype) for rope in kinds)
    numbers = np.array([kinds.index(rope) for rope in ropes], np.int32)
    return made, {_NUMBER: numbers} if len(kinds) > 1 else {}


def check_stated(ropes: tuple[Rope | None, ...], num_keys: int) -> None:
    """Refuses frequencies that depend on the longest sequence where none is stated, for so many keys.

    Args:
      ropes: as `of_layers` takes them.
      num_keys: S; of a cache its columns, of which a layer with a window keeps fewer.

    Raises:
      ValueError: saying how to state it.
    """
    if unstated := next((rope for rope in ropes if rope is not None and not rope.reads(num_keys)), None):
        raise ValueError(
            f"rope type {unstated.kind!r} turns by the longest sequence, which is not stated for rows of {num_keys} "
            f"tokens, more than {unstated.original_length}: model.for_length(longest)"
        )


def _made(rope: Rope, positions: jax.Array, head_dim: int, dtype: Any) -> Rotation:
    return rotations(positions, frequencies(rope, head_dim), jnp.dtype(dtype), rope.attention_factor)


def of_layer(given: LayerInputs) -> Rotation | None:
    """The rotation of a layer; None where its queries and keys do not turn.

    A layer that runs by itself knows its number, and there is nothing to pick. In a loop the number is an array: cosine
    and sine are selected by it, which joins the rotation's own loop and reads B T H numbers for each kind, beside
    B T (N + K) H that are turned; no rotation is one of cosine 1 and sine 0. A backward pass that recomputes nothing
    keeps what was selected, H numbers a token and layer (2 % of what it keeps for 12 layers of hidden size 256).

    Args:
      given: what the layer receives, with its own numbers.
    """
    number = given.numbers.get(_NUMBER, np.int32(0))
    if isinstance(number, np.integer):
        return given.rotations[int(number)]
    there = next(rotation for rotation in given.rotations if rotation is not None)
    still = jnp.ones_like(there[0]), jnp.zeros_like(there[1])
    cos, sin = zip(*(still if rotation is None else rotation for rotation in given.rotations), strict=True)
    return jax.lax.select_n(number, *cos), jax.lax.select_n(number, *sin)
