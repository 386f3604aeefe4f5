"""The keys and values of tokens already seen, for decoding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slot s of a row holds its s-th written token.

    One array per layer, so that attention reads it without slicing a larger one, and the head dim before the slot dim,
    which is the layout of its matmuls. Deep models have fewer arrays, A, each with every A-th layer stacked
    (`schedule.cache_arrays`).
    """

    keys: tuple[jax.Array, ...]  # L times [B, K, S, H], or A times [L / A, B, K, S, H]
    values: tuple[jax.Array, ...]  # of the same shapes
    index: jax.Array  # type: ignore[assignment]  # int32 [], slots written so far, the same in every row


class Seen(NamedTuple):
    """One layer's part of the cache."""

    keys: jax.Array  # [B, K, S, H], or [L / A, B, K, S, H]
    values: jax.Array  # of the same shape
    index: jax.Array  # type: ignore[assignment]  # int32 []
    layer: jax.Array | None = None  # int32 [], its place in arrays of several layers


def extend(seen: Seen, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values with those of T more tokens written after what it holds, in place where it can be.

    Args:
      seen: of the layer.
      keys: [B, K, T, H].
      values: [B, K, T, H].

    Returns:
      keys and values, of the shapes in `seen`.
    """

    def written(old, new):
        at = (0, 0, seen.index, 0) if seen.layer is None else (seen.layer, 0, 0, seen.index, 0)
        new = new.astype(old.dtype).reshape((1,) * (old.ndim - 4) + new.shape)
        return jax.lax.dynamic_update_slice(old, new, [jnp.asarray(i, jnp.int32) for i in at])

    return written(seen.keys, keys), written(seen.values, values)


def of_layer(seen: Seen, kept: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """A layer's own keys and values [B, K, S, H] of what `extend` returns."""
    if seen.layer is None:
        return list(kept)
    return [jax.lax.dynamic_index_in_dim(x, seen.layer, 0, keepdims=False) for x in kept]
