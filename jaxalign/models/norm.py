"""Norms of a layer, of queries and keys, and before the heads."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.ops.norm import layer_norm, rms_norm
from jaxalign.ops.precision import at_least_float32


class Norm(nnx.Module):
    """A scaled norm over the last dims of x: of each token, of each head, or of all heads together.

    By the root mean square, or, with a bias, by mean and variance.
    """

    def __init__(self, config: ModelConfig, *sizes: int):
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        first = jnp.ones if self.offset is None else jnp.zeros
        self.scale = nnx.Param(first(sizes, jnp.dtype(config.param_dtype)))
        self.bias = nnx.Param(jnp.zeros(sizes, jnp.dtype(config.param_dtype))) if config.norm == "layer" else None

    def __call__(self, x):
        scale = self.scale[...]
        scale = scale if self.offset is None else self.offset + at_least_float32(scale)
        if self.bias is not None:
            return layer_norm(x, scale, self.bias[...], self.eps)
        if scale.ndim == 1:
            return rms_norm(x, scale, self.eps)
        return rms_norm(x.reshape(*x.shape[: -scale.ndim], -1), scale.reshape(-1), self.eps).reshape(x.shape)


def normed(norm: Norm | None, x):
    """The same, where the family has no norm there."""
    return x if norm is None else norm(x)
