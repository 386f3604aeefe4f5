"""The keys and values of tokens already seen, for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slot s of a row holds its s-th written token.

    One array per layer, so that attention reads it without slicing a larger one, and the head dim before the slot dim,
    which is the layout of its matmuls. Deep models have fewer arrays, A, each with every A-th layer stacked
    (`schedule.cache_arrays`).

    The array of a layer with a window may have fewer slots, one for each token that the window holds: a ring, in which
    the c-th token lies at slot c mod S. It takes one token at a time (`slot_counts`).
    """

    keys: tuple[jax.Array, ...]  # L times [B, K, S, H], S of each layer, or A times [L / A, B, K, S, H]
    values: tuple[jax.Array, ...]  # of the same shapes
    index: jax.Array  # type: ignore[assignment]  # int32 [], slots written so far, the same in every row


class Seen(NamedTuple):
    """One layer's part of the cache."""

    keys: jax.Array  # [B, K, S, H], or [L / A, B, K, S, H]
    values: jax.Array  # of the same shape
    index: jax.Array  # type: ignore[assignment]  # int32 []
    layer: jax.Array | None = None  # int32 [], its place in arrays of several layers
    ring: bool = False  # whether the token that is written takes the place of the one that leaves the window


def slot_counts(windows: tuple[int | None, ...] | None, width: int, arrays: int) -> tuple[int, ...]:
    """How many slots each array of a cache has, of a layer with a window no more than the window.

    Args:
      windows: of the layers; None: of none.
      width: slots of a layer without a window.
      arrays: of the cache; where there are fewer than layers, all have the width.

    >>> slot_counts((4, None), 10, 2), slot_counts((4, None), 3, 2), slot_counts((4, None, 4, None), 10, 2)
    ((4, 10), (3, 3), (10, 10))
    """
    each = windows if windows is not None and len(windows) == arrays else (None,) * arrays
    return tuple(width if window is None else min(width, window) for window in each)


def rings(windows: tuple[int | None, ...] | None, sizes: Sequence[int]) -> tuple[bool, ...]:
    """Which arrays of a cache are rings: those with as many slots as the window of their layer.

    Args:
      windows: of the layers; None: of none.
      sizes: slots of each array.
    """
    each = windows if windows is not None and len(windows) == len(sizes) else (None,) * len(sizes)
    return tuple(window == size for window, size in zip(each, sizes, strict=True))


def in_ring(columns: jax.Array, end: jax.Array | int, size: int) -> jax.Array:
    """Columns as a ring holds them: the last `size` of them, or fewer.

    Args:
      columns: [..., P, H], the last of which is that before `end`.
      end: int32 [].
      size: S of the ring.

    Returns:
      [..., S, H]; zeros where there are no columns.

    >>> print(in_ring(jnp.arange(3, 8)[:, None], 8, 3).ravel(), in_ring(jnp.arange(3, 5)[:, None], 5, 4).ravel())
    [6 7 5] [4 0 0 3]
    """
    missing = max(size - columns.shape[-2], 0)
    columns = jnp.pad(columns[..., -size:, :], [(0, 0)] * (columns.ndim - 2) + [(missing, 0), (0, 0)])
    return jnp.roll(columns, jnp.asarray(end, jnp.int32) % size, axis=-2)


def ring_columns(end: jax.Array, size: int) -> jax.Array:
    """Which column lies at each slot of a ring; a negative one was never written.

    Args:
      end: int32 [B, 1], one past the last column that was written.
      size: S of the ring.

    Returns:
      int32 [B, S].

    >>> print(ring_columns(jnp.array([[8], [2]]), 3))
    [[ 6  7  5]
     [ 0  1 -1]]
    """
    last = end - 1
    return last - (last - jnp.arange(size, dtype=end.dtype)) % size


def extend(seen: Seen, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values with those of T more tokens written after what it holds, in place where it can be.

    Args:
      seen: of the layer.
      keys: [B, K, T, H].
      values: [B, K, T, H].

    Returns:
      keys and values, of the shapes in `seen`.
    """

    slot = seen.index % seen.keys.shape[-2] if seen.ring else seen.index

    def written(old, new):
        at = (0, 0, slot, 0) if seen.layer is None else (seen.layer, 0, 0, slot, 0)
        new = new.astype(old.dtype).reshape((1,) * (old.ndim - 4) + new.shape)
        return jax.lax.dynamic_update_slice(old, new, [jnp.asarray(i, jnp.int32) for i in at])

    return written(seen.keys, keys), written(seen.values, values)


def of_layer(seen: Seen, kept: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """A layer's own keys and values [B, K, S, H] of what `extend` returns."""
    if seen.layer is None:
        return list(kept)
    return [jax.lax.dynamic_index_in_dim(x, seen.layer, 0, keepdims=False) for x in kept]
