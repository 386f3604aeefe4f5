"""The mlp of a layer."""

from __future__ import annotations

from flax import nnx

from jaxalign.models.config import ModelConfig
from jaxalign.models.linear import Linear
from jaxalign.ops.activation import geglu, gelu, swiglu
from jaxalign.parallel.sharding import constrain


class Mlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`, act SiLU or GELU (SwiGLU and GEGLU, arXiv 2002.05202 eq. 6).

    Without a gate `down(act(up(x)))`, act GELU.
    """

    def __init__(self, config: ModelConfig, rngs):
        D, F = config.embed_dim, config.mlp_dim
        bias = config.mlp_bias
        self.activation = config.activation
        self.gate = None if config.plain_mlp else Linear(config, "mlp/gate", (D,), (F,), bias, rngs)
        self.up = Linear(config, "mlp/up", (D,), (F,), bias, rngs)
        self.down = Linear(config, "mlp/down", (F,), (D,), bias, rngs)

    def __call__(self, x):
        if self.gate is None:
            hidden = gelu(self.up(x), {"gelu": False, "gelu_tanh": True}[self.activation])
        else:
            hidden = {None: swiglu, "gelu_tanh": geglu}[self.activation](self.gate(x), self.up(x))
        return self.down(constrain(hidden, "batch", None, "tensor"))
