"""The decoder-only transformer: modules authored in Flax NNX, used as pure functions of plain nested dicts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.cache import Cache, Seen, extend
from jaxalign.models.config import ModelConfig
from jaxalign.models.position_order import by_position
from jaxalign.ops.activation import swiglu
from jaxalign.ops.attention import attention, choose_backend
from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.attention_short import fits
from jaxalign.ops.linear import linear
from jaxalign.ops.norm import rms_norm
from jaxalign.ops.platform import platform
from jaxalign.ops.readout import take_sources
from jaxalign.ops.rope import computed_once, frequencies, rotate, rotations
from jaxalign.parallel.host_memory import DEVICE, HOST
from jaxalign.parallel.sharding import constrain
from jaxalign.types import Params, Rows

# Layers that a CPU runs one after the other instead of in a loop, whose arrays of all layers, filled with zeros,
# written and read, cost a tenth of a training step. More of them would take too long to compile; who saves memory by
# rematerialisation gets the loop.
_UNROLLED = 8

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_dots_to_host = jax.checkpoint_policies.offload_dot_with_no_batch_dims(DEVICE, HOST)
_saved_to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(), names_which_can_be_offloaded=(SAVED,), offload_src=DEVICE, offload_dst=HOST
)


def _to_host(primitive, *args, **params):
    """Keeps what "dots" keeps, in the host's memory."""
    policy = _dots_to_host if _dots(primitive, *args, **params) else _saved_to_host
    return policy(primitive, *args, **params)


_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _dots, jax.checkpoint_policies.save_only_these_names(SAVED)
    ),
    "offload": _to_host,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Linear(nnx.Module):
    """`y = x kernel + bias` over the last dims of x, in the compute dtype; the kernel is [*inputs, *outputs]."""

    def __init__(self, config: ModelConfig, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, rngs):
        self.contracted = len(inputs)
        self.dtype = config.dtype
        dtype = jnp.dtype(config.param_dtype)
        self.kernel = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), (*inputs, *outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x):
        y = linear(x, self.kernel[...].astype(self.dtype), self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """A scaled root-mean-square norm of each token."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.embed_dim, jnp.dtype(config.param_dtype)))

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query self-attention over intervals, with rotary positions.

    `asking` holds x, rotation and rows of the tokens that need an answer; None: all of them do. `slots` [B, S]: where
    intervals count each token; None: in their order. Returns the answers, and the keys and values [B, K, S, H] of all
    that was seen.
    """

    def __init__(self, config: ModelConfig, rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.attention_bias
        self.query = Linear(config, (D,), (N, H), bias, rngs)
        self.key = Linear(config, (D,), (K, H), bias, rngs)
        self.value = Linear(config, (D,), (K, H), bias, rngs)
        self.out = Linear(config, (N, H), (D,), bias, rngs)
        self.causal, self.backend = config.causal == "rows", config.attention

    def __call__(self, x, rotation, rows: Rows, seen: Seen | None = None, slots=None, asking: Any = None):
        asking_x, asking_rotation, asking_rows = (x, rotation, rows) if asking is None else asking
        q = constrain(rotate(self.query(asking_x), *asking_rotation), "batch", None, "tensor", None)
        k = constrain(rotate(self.key(x), *rotation), "batch", None, "tensor", None)
        v = constrain(self.value(x), "batch", None, "tensor", None)
        kept = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if seen is not None:
            kept = extend(seen, *kept)
            k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in kept)
        causal = (self.causal or slots is not None) and asking is None
        backend = choose_backend(q.shape[1], k.shape[1], q.dtype, causal=causal, asked=self.backend)
        out = attention(q, k, v, asking_rows.attend_start, asking_rows.attend_end, slots_BS=slots, backend=backend)
        return self.out(constrain(out, "batch", None, "tensor", None)), kept


class Mlp(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202 eq. 6)."""

    def __init__(self, config: ModelConfig, rngs):
        D, F = config.embed_dim, config.mlp_dim
        bias = config.mlp_bias
        self.gate = Linear(config, (D,), (F,), bias, rngs)
        self.up = Linear(config, (D,), (F,), bias, rngs)
        self.down = Linear(config, (F,), (D,), bias, rngs)

    def __call__(self, x):
        return self.down(constrain(swiglu(self.gate(x), self.up(x)), "batch", None, "tensor"))


class Block(nnx.Module):
    """One layer: attention, then mlp, each after a norm and added to its input.

    With `sources` [B, M] all tokens are seen, but only those have a result, [B, M, D].
    """

    def __init__(self, config: ModelConfig, rngs):
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x, rotation, rows: Rows, seen: Seen | None = None, slots=None, sources=None):
        seen_x, asking = self.attention_norm(x), None
        if sources is not None:
            x, *at = jax.tree.map(lambda y: take_sources(y, sources), (x, rotation, rows))
            asking = self.attention_norm(x), *at
        attended, kept = self.attention(seen_x, rotation, rows, seen, slots, asking)
        x = constrain(x + attended, "batch", None, None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None), kept


class Embed(nnx.Module):
    """Token vectors, row v of `embedding` for token v."""

    def __init__(self, config: ModelConfig, rngs):
        self.dtype = config.dtype
        shape = (config.vocab_size, config.embed_dim)
        dtype = jnp.dtype(config.param_dtype)
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(self, tokens):
        # Gathered whole first: a lookup in a table split over `fsdp` would move every token's vector instead.
        table = constrain(self.embedding[...].astype(self.dtype), "tensor", None)
        return constrain(jnp.take(table, tokens, axis=0), "batch", None, None)


class Ends(nnx.Module):
    """What is not a layer: the embedding, the last norm and the head."""

    def __init__(self, config: ModelConfig, rngs):
        D, V = config.embed_dim, config.vocab_size
        self.embed = Embed(config, rngs)
        self.norm = Norm(config)
        if config.head == "score":
            # std 1 / sqrt(D + 1): scores start small beside the hidden state's unit scale (arXiv 2009.01325 app. C)
            scale = dataclasses.replace(config, initializer_range=(D + 1) ** -0.5)
            self.score = Linear(scale, (D,), (1,), False, rngs)
        elif not config.tied:
            self.lm_head = Linear(config, (D,), (V,), False, rngs)


@functools.lru_cache(maxsize=64)
def _graph(kind: Callable[..., nnx.Module], config: ModelConfig) -> tuple[Any, Params]:
    """The structure of a module, and its parameters as a plain dict of shapes."""
    module = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(params=0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    if jax.tree.leaves(rest):
        raise TypeError(f"{kind} holds state that is not a parameter: {rest}")
    return graphdef, nnx.to_pure_dict(params)


def _init(kind: Callable[..., nnx.Module], config: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer as pure functions of its parameters; hashable, so it may be closed over or static in a jit."""

    config: ModelConfig

    def abstract(self) -> Params:
        """The one declaration: shape and dtype of every parameter, layers stacked [L, ...]."""
        c = self.config
        params = dict(_graph(Ends, c)[1])
        params["layers"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((c.num_layers, *x.shape), x.dtype), _graph(Block, c)[1]
        )
        return params

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: kernels normal(0, initializer_range), norms 1, biases 0. Pure, so jit it into shards.

        Args:
          key: a jax random key.
        """
        ends, layers = jax.random.split(key)
        params = _init(Ends, self.config, ends)
        keys = jax.random.split(layers, self.config.num_layers)
        params["layers"] = jax.vmap(lambda k: _init(Block, self.config, k))(keys)
        return params

    def apply(
        self,
        params: Params,
        rows: Rows,
        cache: Cache | None = None,
        *,
        sources: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        """Hidden states of rows of tokens, after the last norm.

        Args:
          params: as `abstract` says; with a cache also with `layers` as a tuple of each layer's own.
          rows: [B, T]; with a cache, the intervals refer to its slots and the T tokens are written to the slots
            `index` to `index + T`.
          cache: keys and values of earlier tokens.
          sources: int32 [B, M], the tokens of each row whose hidden states are read; None: all of them, in order.

        Returns:
          hidden [B, T, D], of sources [B, M, D], in the compute dtype, the advanced cache (None without one), auxiliary
          numbers (none).
        """
        c = self.config
        graphdef = _graph(Block, c)[0]
        slots = None  # where each token stood, if not where it is
        if cache is None and self._takes_order(rows):
            rows, slots, places = by_position(rows)
            sources = places if sources is None else take_sources(places, sources)
        ends, x, rotation = self._enter(params, rows)
        if cache is not None:
            # Each layer by itself: its part of the cache is written in place, and neither that nor its parameters
            # are cut out of stacked arrays, which would copy them for every token.
            grown = []
            for layer, keys, values in zip(self._layers(params), cache.keys, cache.values, strict=True):
                x, kept = nnx.merge(graphdef, layer)(x, rotation, rows, Seen(keys, values, cache.index))
                grown.append(kept)
            all_keys, all_values = zip(*grown, strict=True)
            cache = Cache(all_keys, all_values, cache.index + rows.tokens.shape[1])
        elif platform() == "cpu" and c.remat == "none" and c.num_layers <= _UNROLLED:
            *layers, last = self._layers(params)
            rotation = computed_once(rotation)
            for layer in layers:
                x, _ = nnx.merge(graphdef, layer)(x, rotation, rows, slots=slots)
            # What the last layer makes of a token is seen by no other: only those that are read go through it.
            few = sources is not None and 4 * sources.shape[1] <= 3 * rows.tokens.shape[1]
            x, _ = nnx.merge(graphdef, last)(x, rotation, rows, slots=slots, sources=sources if few else None)
            sources = None if few else sources
        else:

            def body(x, layer):
                return nnx.merge(graphdef, layer)(x, rotation, rows, slots=slots)[0], None

            if c.remat != "none":
                # Inside a scan nothing is merged across the checkpoint anyway, so its barriers would only cost.
                body = jax.checkpoint(body, policy=_POLICIES[c.remat], prevent_cse=False)
            x, _ = jax.lax.scan(body, x, params["layers"])
        if sources is not None:
            x = take_sources(x, sources)
        return ends.norm(x), cache, {}

    def _takes_order(self, rows: Rows) -> bool:
        """Whether rows go through the layers in the order of positions: their attention leaves keys out then."""
        c, (B, T) = self.config, rows.tokens.shape
        if c.causal != "positions" or not fits(B, T, T, c.num_heads):
            return False
        return choose_backend(T, T, c.dtype, causal=True, asked=c.attention) == "causal"

    def _layers(self, params: Params) -> tuple[Params, ...]:
        """Each layer's own parameters; the gradient puts theirs side by side in one go."""
        layers = params["layers"]
        if isinstance(layers, tuple):
            return layers
        leaves, structure = jax.tree.flatten(layers)
        cut = [[x.squeeze(0) for x in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
        return tuple(jax.tree.unflatten(structure, own) for own in zip(*cut, strict=True))

    def prefill(self, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states as `apply` gives them, and what a cache needs to go on from these rows.

        Args:
          params: as `abstract` says.
          rows: [B, T].

        Returns:
          hidden [B, T, D], keys and values [L, B, K, T, H], all in the compute dtype.
        """
        graphdef = _graph(Block, self.config)[0]
        ends, x, rotation = self._enter(params, rows)
        x, (keys, values) = jax.lax.scan(
            lambda x, layer: nnx.merge(graphdef, layer)(x, rotation, rows), x, params["layers"]
        )
        return ends.norm(x), keys, values

    def _enter(self, params: Params, rows: Rows) -> tuple[Any, jax.Array, tuple[jax.Array, jax.Array]]:
        """What is not a layer, the tokens' vectors, and the rotations of all layers."""
        c = self.config
        ends = nnx.merge(_graph(Ends, c)[0], {k: v for k, v in params.items() if k != "layers"})
        rotation = rotations(rows.positions, frequencies(c.rope, c.head_dim), jnp.dtype(c.dtype))
        return ends, ends.embed(rows.tokens), rotation

    def head(self, params: Params) -> jax.Array:
        """The matrix [D, V] from hidden states to logits, in the compute dtype; tied: the embedding transposed."""
        if self.config.head != "lm":
            raise ValueError("a model with a scalar head has no token head")
        kernel = params["embed"]["embedding"].T if self.config.tied else params["lm_head"]["kernel"]
        return kernel.astype(self.config.dtype)

    def score_kernel(self, params: Params) -> jax.Array:
        """The matrix [D, 1] from hidden states to a score or value, in the parameters' dtype."""
        if self.config.head != "score":
            raise ValueError("a model with a token head has no scalar head")
        return params["score"]["kernel"]
