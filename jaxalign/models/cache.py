"""The keys and values of tokens already seen, for decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slot s of a row holds its s-th written token."""

    keys: jax.Array  # [L, B, S, K, H]
    values: jax.Array  # [L, B, S, K, H]
    index: jax.Array  # type: ignore[assignment]  # int32 [], slots written so far, the same in every row


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
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
