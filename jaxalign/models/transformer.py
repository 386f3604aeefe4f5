"""The decoder-only transformer: modules authored in Flax NNX, used as pure functions of plain nested dicts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models import ropes, windows
from jaxalign.models.adapter import base, fresh, has_adapter
from jaxalign.models.cache import Cache, extend, of_layer
from jaxalign.models.config import ModelConfig
from jaxalign.models.embed import Embed
from jaxalign.models.layer_inputs import KeysValues, LayerInputs, Queries, Rotation
from jaxalign.models.linear import Linear
from jaxalign.models.mlp import Mlp
from jaxalign.models.norm import Norm, normed
from jaxalign.models.position_order import by_position, pays
from jaxalign.models.quantised import parts_of
from jaxalign.models.schedule import AROUND_ATTENTION, run_cached, run_layers, run_prefill
from jaxalign.models.stacks import cut
from jaxalign.models.token_rows import EMBEDDING, HEAD, has_rows
from jaxalign.ops.attention import attention, choose_backend
from jaxalign.ops.attention_scores import Scores
from jaxalign.ops.logits import Head
from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.readout import take_sources
from jaxalign.ops.rope import query_scale, rotate
from jaxalign.ops.trees import join
from jaxalign.parallel.sharding import constrain
from jaxalign.types import Params, Rows


def _turned(x, rotation: Rotation | None):
    """Queries or keys by their positions; the same, in a layer where they do not turn."""
    return x if rotation is None else rotate(x, *rotation)


def _kept(x):
    """The same, by the name under which a rematerialisation policy may keep it."""
    return checkpoint_name(x, AROUND_ATTENTION)


class Attention(nnx.Module):
    """Grouped-query self-attention over intervals, with rotary positions."""

    def __init__(self, config: ModelConfig, rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.rope = config.rope
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        bias = config.attention_bias
        self.query = Linear(config, "attention/query", (D,), (N, H), bias, rngs)
        self.key = Linear(config, "attention/key", (D,), (K, H), bias, rngs)
        self.value = Linear(config, "attention/value", (D,), (K, H), bias, rngs)
        bias = bias if config.output_bias is None else config.output_bias
        self.out = Linear(config, "attention/out", (N, H), (D,), bias, rngs)
        sizes = {None: None, "head": ((H,), (H,)), "projection": ((N, H), (K, H))}[config.qk_norm]
        self.query_norm, self.key_norm = (None, None) if sizes is None else (Norm(config, *size) for size in sizes)

    def __call__(self, x, rotation: Rotation | None, given: LayerInputs, queries: Queries):
        """The answers to the query tokens, and the keys and values of all tokens that they see: [B, K, S, H], with a
        cache as it holds them."""
        q = _turned(normed(self.query_norm, self.query(queries.x)), queries.rotation)
        if self.rope.query_growth is not None:
            scale = query_scale(queries.rows.positions, self.rope.query_growth, self.rope.original_length, q.dtype)
            q = q * scale[..., None, None].astype(q.dtype)
        q = _kept(constrain(q, "batch", None, "tensor", None))
        k = _turned(normed(self.key_norm, self.key(x)), rotation)
        k = _kept(constrain(k, "batch", None, "tensor", None))
        v = _kept(constrain(self.value(x), "batch", None, "tensor", None))
        kept = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if given.seen is not None:
            kept = extend(given.seen, *kept)
            k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in of_layer(given.seen, kept))
        seen = windows.visible_keys(given, queries.rows, k.shape[1])
        backend = choose_backend(
            *(q.shape[1], k.shape[1], q.dtype),
            causal=given.causal,
            asked=given.backend,
            softcap=self.softcap is not None,
            window=seen.window is not None,
        )
        of_scores: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        out = attention(q, k, v, backend=backend, **of_scores, **seen._asdict())
        return _kept(self.out(constrain(out, "batch", None, "tensor", None))), kept


class Block(nnx.Module):
    """One layer: attention, then mlp, each added to its input; a norm stands before each, after it, or both.

    Parallel, the mlp does not read what attention made: both are added to the layer's input.

    All tokens are seen; those that are query tokens have a result, [B, M, D].
    """

    def __init__(self, config: ModelConfig, rngs):
        before, after = config.norms != "after", config.norms is not None
        norm = functools.partial(Norm, config, config.embed_dim)
        self.attention_norm = norm() if before else None
        self.attention = Attention(config, rngs)
        self.attention_out_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp = Mlp(config, rngs)
        self.mlp_out_norm = norm() if after else None
        self.scale, self.parallel = config.residual_scale, config.parallel

    def __call__(self, x, given: LayerInputs):
        seen_x, rotation = normed(self.attention_norm, x), ropes.of_layer(given)
        if given.queries is None:
            queries = Queries(seen_x, rotation, given.rows)
        else:
            x, *at = jax.tree.map(lambda y: take_sources(y, given.queries), (x, rotation, given.rows))
            queries = Queries(normed(self.attention_norm, x), *at)
        attended, kept = self.attention(seen_x, rotation, given, queries)
        between = constrain(x + self._scaled(normed(self.attention_out_norm, attended)), "batch", None, None)
        read = x if self.parallel else between
        made = self._scaled(normed(self.mlp_out_norm, self.mlp(normed(self.mlp_norm, read))))
        return constrain(between + made, "batch", None, None), kept

    def _scaled(self, x):
        """What is added, by the family's factor."""
        return x if self.scale is None else (at_least_float32(x) * self.scale).astype(x.dtype)


class Ends(nnx.Module):
    """What is not a layer: the embedding, the last norm and the head."""

    def __init__(self, config: ModelConfig, rngs):
        config = dataclasses.replace(config, quantised=None)
        D, V = config.embed_dim, config.vocab_size
        self.embed = Embed(config, rngs)
        self.norm = Norm(config, D)
        if config.head == "score":
            # std 1 / sqrt(D + 1): scores start small beside the hidden state's unit scale (arXiv 2009.01325 app. C)
            scale = dataclasses.replace(config, initializer_range=(D + 1) ** -0.5)
            self.score = Linear(scale, "score", (D,), (config.num_labels or 1,), bool(config.score_bias), rngs)
        elif not config.tied:
            self.lm_head = Linear(config, "lm_head", (D,), (V,), False, rngs)
            ids = None if config.token_rows is None else config.token_rows.ids(HEAD)
            if ids is not None:
                rows = at_least_float32(self.lm_head.kernel[...].T[ids])
                self.lm_head.token_rows = nnx.Param(rows)  # type: ignore[attr-defined]


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
    attention: str | None = None  # a backend of `jaxalign.ops.attention`; None: what suits the platform

    def plain(self) -> Model:
        """The base model in whole kernels: without what is trained beside them, not quantised, in one stack."""
        config = dataclasses.replace(self.config, adapter=None, quantised=None, cuts=None, token_rows=None)
        return self if config == self.config else dataclasses.replace(self, config=config)

    def abstract(self) -> Params:
        """The one declaration: shape and dtype of every parameter, layers stacked [L, ...], or in several stacks."""
        c = self.config
        own = lambda tree, *more: jax.tree.map(lambda x: jax.ShapeDtypeStruct((*more, *x.shape), x.dtype), tree)  # noqa: E731
        return own(_graph(Ends, c)[1]) | {"layers": cut(own(_graph(Block, c)[1], c.num_layers), c.cuts)}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: kernels normal(0, initializer_range), norms 1 with their offset, biases 0.

        Pure, so jit it into shards.

        Args:
          key: a jax random key.
        """
        ends, layers = jax.random.split(key)
        params = _init(Ends, self.config, ends)
        keys = jax.random.split(layers, self.config.num_layers)
        block = functools.partial(_init, Block, self.config)
        # Quantised: one after the other, so that one layer's kernels are there at a time.
        params["layers"] = jax.vmap(block)(keys) if self.config.quantised is None else jax.lax.map(block, keys)
        if self.config.adapter is not None:
            params = join(base(params), self.init_adapter(key, params["layers"]))
        return params | {"layers": cut(params["layers"], self.config.cuts)}

    def init_adapter(self, key: jax.Array, kernels: Params) -> Params:
        """The parameters of a fresh adapter, which changes nothing yet; arguments as `adapter.fresh` takes them."""
        assert self.config.adapter is not None
        return fresh(self.config.adapter, self.abstract(), key, kernels)

    def normed_kernels(self) -> set[str]:
        """The paths of what a fresh adapter takes norms of: with DoRA the kernels that it updates."""
        adapter, kind = self.config.adapter, self.config.quantised
        kernels = [f"layers/{path}/kernel" for path, _ in adapter.updates] if adapter and adapter.dora else []
        return set(kernels) if kind is None else {part for kernel in kernels for part in parts_of(kernel, kind)}

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
          params: as `abstract` says; with a cache also with `layers` as `schedule.split_layers` gives them.
          rows: [B, T]; with a cache, the intervals refer to its slots and the T tokens are written to the slots
            `index` to `index + T`; one token, where an array of the cache is a ring.
          cache: keys and values of earlier tokens.
          sources: int32 [B, M], the tokens of each row whose hidden states are read; None: all of them, in order.

        Returns:
          hidden [B, T, D], of sources [B, M, D], in the compute dtype, the advanced cache (None without one), auxiliary
          numbers (none).
        """
        if cache is not None:
            ends, x, given = self._enter(params, rows, num_keys=max(keys.shape[-2] for keys in cache.keys))
            x, cache = run_cached(self._layer, params["layers"], x, given, cache, self.config.windows)
            return ends.norm(x if sources is None else take_sources(x, sources)), cache, {}

        def stack(rows: Rows, slots: jax.Array | None, sources: jax.Array | None) -> jax.Array:
            ends, x, given = self._enter(params, rows, slots)
            return ends.norm(run_layers(self._layer, params["layers"], x, given, sources, remat=self.config.remat))

        c = self.config
        run = by_position(stack) if pays(rows, c.num_heads, c.dtype, self.attention) else stack
        return run(rows, None, sources), None, {}

    def for_length(self, longest: int) -> Model:
        """The same model for sequences of up to this length, where its rope type depends on it and states none.

        Raises:
          InputError: the model has no positions for so many tokens.
        """
        config = self.config.for_length(longest)
        return self if config is self.config else dataclasses.replace(self, config=config)

    def prefill(self, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states as `apply` gives them, and what a cache needs to continue these rows.

        Args:
          params: as `abstract` says.
          rows: [B, T].

        Returns:
          hidden [B, T, D], keys and values [L, B, K, T, H], all in the compute dtype.
        """
        ends, x, given = self._enter(params, rows)
        x, keys, values = run_prefill(self._layer, params["layers"], x, given)
        return ends.norm(x), keys, values

    def _layer(self, params: Params, x: jax.Array, given: LayerInputs) -> tuple[jax.Array, KeysValues]:
        """One layer, of its own parameters; without those of an adapter it is the base model's."""
        config = self.config
        if config.adapter is not None:
            if has_adapter(params):
                params = config.adapter.scaled(params, given.numbers, config.embed_dim, config.dtype)
            else:
                config = dataclasses.replace(config, adapter=None)
        return nnx.merge(_graph(Block, config)[0], params)(x, given)

    def _enter(
        self, params: Params, rows: Rows, slots: jax.Array | None = None, num_keys: int | None = None
    ) -> tuple[Any, jax.Array, LayerInputs]:
        """What is not a layer, the tokens' vectors, and what every layer receives; `num_keys`: of a cache."""
        c, own = self.config, {k: v for k, v in params.items() if k != "layers"}
        if c.token_rows is not None and not has_rows(own):
            c = dataclasses.replace(c, token_rows=None)
        ends = nnx.merge(_graph(Ends, c)[0], own)
        num_keys = rows.tokens.shape[1] if num_keys is None else num_keys
        rotations, turns = ropes.of_layers(c.ropes or (c.rope,), rows.positions, num_keys, c.head_dim, c.dtype)
        window, widths = windows.of_layers(c.windows, num_keys)
        numbers = turns | widths | (c.adapter.numbers(c.dtype) if c.adapter else {})
        given = LayerInputs(rotations, rows, numbers, slots, backend=self.attention, window=window)
        return ends, ends.embed(rows.tokens, rows.positions), given

    def head(self, params: Params) -> jax.Array | Head:
        """The matrix [D, V] from hidden states to logits, in the compute dtype; tied: the embedding transposed.

        Where logits are scaled or capped, a `Head`, which `ops.logits.logits` and the readouts take in its place.
        """
        if self.config.head != "lm":
            raise ValueError("a model with a scalar head has no token head")
        path = EMBEDDING if self.config.tied else HEAD
        module, name = path.split("/")
        kernel, rows = params[module][name], params[module].get("token_rows")
        if rows is not None and self.config.token_rows is not None:
            kernel = self.config.token_rows.joined(path, kernel.astype(self.config.dtype), rows)
        kernel = kernel.T if self.config.tied else kernel
        kernel, scale, cap = kernel.astype(self.config.dtype), self.config.logit_scale, self.config.logit_softcap
        return kernel if scale is None and cap is None else Head(kernel, Scores(scale or 1.0, cap))

    def score_kernel(self, params: Params) -> jax.Array:
        """The matrix [D, O] from hidden states to a score or value, or to several labels, in the parameters' dtype.

        A classifier of tokens may have a bias [O] beside it, `params["score"]["bias"]`.
        """
        if self.config.head != "score":
            raise ValueError("a model with a token head has no scalar head")
        return params["score"]["kernel"]
