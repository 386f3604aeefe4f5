"""Token vectors, what the first layer reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.models.token_rows import EMBEDDING
from jaxalign.ops.embedding import lookup
from jaxalign.ops.precision import at_least_float32
from jaxalign.parallel.sharding import constrain


class Embed(nnx.Module):
    """Token vectors, row v of `embedding` for token v, times a factor where the family has one.

    Where it has a table of positions, row p of `positions` is added at position p; past its end there is NaN.
    """

    def __init__(self, config: ModelConfig, rngs):
        self.dtype = config.dtype
        self.factor = config.embed_scale
        dtype = jnp.dtype(config.param_dtype)
        table = lambda *shape: config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)  # noqa: E731
        self.embedding = nnx.Param(table(config.vocab_size, config.embed_dim))
        self.size, self.own = config.vocab_size, config.token_rows
        ids = None if self.own is None else self.own.ids(EMBEDDING)
        self.token_rows = None if ids is None else nnx.Param(at_least_float32(self.embedding[...][ids]))
        places = config.num_positions
        self.positions = None if places is None else nnx.Param(table(places, config.embed_dim))

    def __call__(self, tokens, positions):
        x = self._rows(self.embedding, tokens)
        if self.own is not None and self.token_rows is not None:
            x = self.own.looked_up(x, tokens, self.token_rows[...], self.size)
        x = x if self.factor is None else x * jnp.asarray(self.factor, x.dtype)  # rounded as the family's own code does
        x = x if self.positions is None else x + self._rows(self.positions, positions)
        return constrain(x, "batch", None, None)

    def _rows(self, table: nnx.Param, numbers):
        """Row n of a table for each number n."""
        if numbers.shape[1] == 1:  # decoding, whose weights may lie otherwise than in training: as they lie, so be it
            return jnp.take(table[...].astype(self.dtype), numbers, axis=0)
        return lookup(table[...], numbers, self.dtype)
