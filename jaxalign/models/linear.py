"""Matrices of a layer and of the heads, whole or in few bits, and low-rank updates beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.models.quantised import quantised, quantised_parts
from jaxalign.ops.linear import linear
from jaxalign.ops.low_rank import LowRank, adapted


class Linear(nnx.Module):
    """`y = x kernel + bias` over the last dims of x, in the compute dtype; the kernel is [*inputs, *outputs].

    Where the model's adapter names its path it holds an update of the kernel beside it.  A quantised model's holds the
    kernel in few bits, frozen.
    """

    def __init__(
        self, config: ModelConfig, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, rngs
    ):
        self.contracted = len(inputs)
        self.dtype = config.dtype
        dtype = jnp.dtype(config.param_dtype)
        kernel = config.initializer_range * jax.random.normal(rngs.params(), (*inputs, *outputs), dtype)
        parts = {} if config.quantised is None else quantised_parts(kernel, path, config.quantised)
        self.kernel = None if parts else nnx.Param(kernel)
        for name, part in parts.items():
            setattr(self, name, nnx.Param(part))
        self.path, self.parts, self.embed_dim = path, tuple(parts), config.embed_dim
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        update = None if config.adapter is None else config.adapter.update(path)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)))  # noqa: E731
        self.lora_a = None if update is None else zeros(*inputs, update.rank)
        self.lora_b = None if update is None else zeros(update.rank, *outputs)
        self.magnitude = zeros(*outputs) if update is not None and config.adapter.dora else None
        self.scale = 1.0 if update is None or update.scale is None else update.scale

    def __call__(self, x):
        if self.kernel is not None:
            kernel = self.kernel[...].astype(self.dtype)
        else:
            kernel = quantised({name: getattr(self, name)[...] for name in self.parts}, self.path, self.embed_dim)
        if self.lora_a is None:
            y = linear(x, kernel, self.contracted)
        else:
            magnitude = None if self.magnitude is None else self.magnitude[...]
            update = LowRank(self.lora_a[...], self.lora_b[...] * self.scale, magnitude)
            y = adapted(x, kernel, update, self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
