"""Matrices of a layer and of the heads, and low-rank updates beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.ops.linear import linear
from jaxalign.ops.low_rank import LowRank, adapted


class Linear(nnx.Module):
    """`y = x kernel + bias` over the last dims of x, in the compute dtype; the kernel is [*inputs, *outputs].

    Where the model's adapter names its path it holds an update of the kernel beside it.
    """

    def __init__(
        self, config: ModelConfig, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, rngs
    ):
        self.contracted = len(inputs)
        self.dtype = config.dtype
        dtype = jnp.dtype(config.param_dtype)
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), (*inputs, *outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        update = None if config.adapter is None else config.adapter.update(path)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)))  # noqa: E731
        self.lora_a = None if update is None else zeros(*inputs, update.rank)
        self.lora_b = None if update is None else zeros(update.rank, *outputs)
        self.magnitude = zeros(*outputs) if update is not None and config.adapter.dora else None
        self.scale = 1.0 if update is None or update.scale is None else update.scale

    def __call__(self, x):
        kernel = self.kernel[...].astype(self.dtype)
        if self.lora_a is None:
            y = linear(x, kernel, self.contracted)
        else:
            magnitude = None if self.magnitude is None else self.magnitude[...]
            update = LowRank(self.lora_a[...], self.lora_b[...] * self.scale, magnitude)
            y = adapted(x, kernel, update, self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
