"""The keys and values of tokens already seen, for decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slot s of a row holds its s-th written token.

    An array for each layer, so that writing a token changes it in place, and the head before the slot, so that the
    products of attention read it as it lies.
    """

    keys: tuple[jax.Array, ...]  # L times [B, K, S, H]
    values: tuple[jax.Array, ...]  # L times [B, K, S, H]
    index: jax.Array  # type: ignore[assignment]  # int32 [], slots written so far, the same in every row


class Seen(NamedTuple):
    """One layer of a cache."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]
    index: jax.Array  # type: ignore[assignment]  # int32 []


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache.

    Args:
      config: of the model.
      batch: B, rows.
      length: S, slots: prompt and new tokens together.
      dtype: of keys and values; default: the model's compute dtype.

    Returns:
      A cache of zeros with index 0.
    """
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((), jnp.int32))


def extend(seen: Seen, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values with those of T more tokens written behind what it holds.

    Args:
      seen: of the layer.
      keys: [B, K, T, H].
      values: [B, K, T, H].

    Returns:
      keys and values [B, K, S, H].
    """
    at = tuple(jnp.asarray(i, jnp.int32) for i in (0, 0, seen.index, 0))
    new = zip((seen.keys, seen.values), (keys, values), strict=True)
    first, second = (jax.lax.dynamic_update_slice(old, part.astype(old.dtype), at) for old, part in new)
    return first, second
