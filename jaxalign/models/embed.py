"""Token vectors, what the first layer reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.ops.embedding import lookup
from jaxalign.parallel.sharding import constrain


class Embed(nnx.Module):
    """Token vectors, row v of `embedding` for token v, times a factor where the family has one."""

    def __init__(self, config: ModelConfig, rngs):
        self.dtype = config.dtype
        self.factor = config.embed_scale
        shape = (config.vocab_size, config.embed_dim)
        dtype = jnp.dtype(config.param_dtype)
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(self, tokens):
        if tokens.shape[1] == 1:  # decoding, whose weights may lie otherwise than in training: where they lie, so be it
            x = jnp.take(self.embedding[...].astype(self.dtype), tokens, axis=0)
        else:
            x = lookup(self.embedding[...], tokens, self.dtype)
        x = x if self.factor is None else x * jnp.asarray(self.factor, x.dtype)  # rounded as the family's own code does
        return constrain(x, "batch", None, None)
