"""How layers run: scanned with a rematerialisation policy, one by one on a CPU, from a cache, or filling one."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.cache import Cache, Seen, rings
from jaxalign.models.layer_inputs import KeysValues, LayerInputs
from jaxalign.models.stacks import Stack, len_of, stacks
from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.platform import platform
from jaxalign.ops.readout import take_sources
from jaxalign.ops.rope import computed_once
from jaxalign.parallel.host_memory import DEVICE, HOST
from jaxalign.types import Params

Layer = Callable[[Params, jax.Array, LayerInputs], tuple[jax.Array, KeysValues]]

# Up to so many layers run one after the other instead of in a loop, by platform: a scan's stacked residuals and
# gradients, which are zeroed, written and read, cost a tenth of a training step on a CPU, and on a GPU a third of all
# memory traffic outside of products. More layers would take too long to compile. With rematerialisation, which is there
# to save memory, a CPU scans them; a GPU's compiler needs no more for layers one by one. A TPU's writes residuals where
# they are made.
_UNROLLED = {"cpu": 8, "gpu": 48}

# Decoding has a program of all layers one after the other, whose compile time grows with them. Where a platform reads
# weights and caches where they lie in a stack, deep models run in a loop from this depth on, a few layers a turn. A CPU
# and a GPU copy what they slice out of a stack: a step then takes half as long again on a CPU, and on a GPU moves its
# weights three times.
_DEEP = {"tpu": 48}
_A_TURN = 4

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_dots_to_host = jax.checkpoint_policies.offload_dot_with_no_batch_dims(DEVICE, HOST)
_saved_to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(), names_which_can_be_offloaded=(SAVED,), offload_src=DEVICE, offload_dst=HOST
)


def _to_host(primitive, *args, **params):
    """The policy "dots", with what it saves offloaded to host memory."""
    policy = _dots_to_host if _dots(primitive, *args, **params) else _saved_to_host
    return policy(primitive, *args, **params)


# Queries, keys, values and the output projection: with attention's result, what the policy "attention" keeps. It leaves
# out what is widest, the mlp's.
AROUND_ATTENTION = "around attention"

_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _dots, jax.checkpoint_policies.save_only_these_names(SAVED)
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED, AROUND_ATTENTION),
    "offload": _to_host,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Rotated queries and keys in place of what they are made of: as many numbers, and nothing to rotate again. A TPU may
# pad arrays of few heads.
_DOTS_ROTATED = jax.checkpoint_policies.save_from_both_policies(_dots, _POLICIES["attention"])


def _policy(remat: str) -> Callable[..., Any]:
    return _DOTS_ROTATED if remat == "dots" and platform() == "gpu" else _POLICIES[remat]


_settled: contextvars.ContextVar[str | None] = contextvars.ContextVar("settled_remat", default=None)


@contextlib.contextmanager
def settled_remat(policy: str) -> Iterator[None]:
    """While a step is traced in the block, models whose policy is "auto" take this one.

    Elsewhere these recompute what `full` does, and nothing on a CPU.

    Args:
      policy: any other than "auto".
    """
    token = _settled.set(policy)
    try:
        yield
    finally:
        _settled.reset(token)


def run_layers(
    layer: Layer,
    layers: Params,
    x: jax.Array,
    given: LayerInputs,
    sources: jax.Array | None,
    *,
    remat: str,
) -> jax.Array:
    """Runs all layers.

    Several stacks run one after the other. Of those below the first that is trained nothing is differentiated: a
    backward pass ends where training begins.

    Args:
      layer: (params of a layer, x, given) -> (x, its keys and values).
      layers: their parameters, stacked [L, ...], in one stack or several.
      x: [B, T, D].
      given: what every layer receives, numbers [L] of each.
      sources: int32 [B, M], the tokens that are read; None: all of them.
      remat: what the backward pass recomputes, a key of `_POLICIES`, "none", or "auto" (see `settled_remat`).

    Returns:
      [B, T, D], of sources [B, M, D].
    """
    if remat == "auto":
        remat = _settled.get() or ("none" if platform() == "cpu" else "full")
    in_place = remat == "none" and not _in_few_bits(layers) if platform() == "cpu" else remat != "offload"
    if in_place and stacks(layers)[-1].stop <= _UNROLLED.get(platform(), 0):
        return _one_by_one(layer, layers, x, given, sources, remat)

    def body(x, own):
        return layer(own[0], x, given.of_layer(own[1]))[0], None

    if remat != "none":
        # Inside a scan nothing is merged across the checkpoint anyway, so its barriers would only cost.
        body = jax.checkpoint(body, policy=_policy(remat), prevent_cse=False)
    for stack in stacks(layers):
        x, _ = jax.lax.scan(body, x, (stack.layers, _numbers(given, stack)))
    return x if sources is None else take_sources(x, sources)


def _one_by_one(
    layer: Layer, layers: Params, x: jax.Array, given: LayerInputs, sources: jax.Array | None, remat: str
) -> jax.Array:
    def run(own: Params, x: jax.Array, given: LayerInputs) -> jax.Array:
        body = lambda own, x: layer(own, x, given)[0]  # noqa: E731
        return (body if remat == "none" else jax.checkpoint(body, policy=_policy(remat)))(own, x)

    *others, (last, numbers) = _each(layers, given.numbers)
    if platform() == "cpu":
        kept = tuple(None if rotation is None else computed_once(rotation) for rotation in given.rotations)
        given = given._replace(rotations=kept)
    for own, own_numbers in others:
        x = run(own, x, given.of_layer(own_numbers))
    # What the last layer makes of a token is seen by no other: only those that are read go through it.
    few = sources is not None and 4 * sources.shape[1] <= 3 * x.shape[1]
    x = run(last, x, given.of_layer(numbers)._replace(queries=sources if few else None))
    return x if sources is None or few else take_sources(x, sources)


def run_cached(
    layer: Layer,
    layers: Params,
    x: jax.Array,
    given: LayerInputs,
    cache: Cache,
    windows: tuple[int | None, ...] | None = None,
) -> tuple[jax.Array, Cache]:
    """All layers over T more tokens.

    One by one, so that neither a layer's cache nor its parameters are cut out of stacked arrays, which copies them for
    every token; or, where the cache has fewer arrays than layers, in a loop, which so many layers go through at a time.

    Args:
      layer: as `run_layers` takes it.
      layers: their parameters, as `split_layers` gives them; or stacked, for a cache of an array for each layer.
      x: [B, T, D].
      given: what every layer receives.
      cache: of the earlier tokens.
      windows: of the layers, by which rings are told from arrays of all columns; None: of none.

    Returns:
      [B, T, D] and the cache with the new tokens.
    """
    if cache.keys[0].ndim == 5:
        return _run_stacked(layer, layers, x, given, cache)
    ring = rings(windows if x.shape[1] == 1 else None, [keys.shape[2] for keys in cache.keys])
    grown = []
    own_caches = zip(cache.keys, cache.values, ring, strict=True)
    for (own, numbers), (keys, values, wraps) in zip(_each(layers, given.numbers), own_caches, strict=True):
        seen = Seen(keys, values, cache.index, ring=wraps)
        x, kept = layer(own, x, given.of_layer(numbers)._replace(seen=seen))
        grown.append(kept)
    all_keys, all_values = zip(*grown, strict=True)
    return x, Cache(all_keys, all_values, cache.index + x.shape[1])


def _run_stacked(
    layer: Layer, layers: Params, x: jax.Array, given: LayerInputs, cache: Cache
) -> tuple[jax.Array, Cache]:
    arrays, turns = len(cache.keys), cache.keys[0].shape[0]

    def body(carry, own):
        x, kept = carry
        turn, params, numbers = own
        grown = []
        for i, (keys, values) in enumerate(kept):
            of_layer = given.of_layer({name: n[i] for name, n in numbers.items()})
            x, now = layer(params[i], x, of_layer._replace(seen=Seen(keys, values, cache.index, turn)))
            grown.append(now)
        return (x, grown), None

    numbers = {name: n.reshape(turns, arrays) for name, n in given.numbers.items()}
    kept = list(zip(cache.keys, cache.values, strict=True))
    (x, kept), _ = jax.lax.scan(body, (x, kept), (jnp.arange(turns, dtype=jnp.int32), layers, numbers))
    all_keys, all_values = zip(*kept, strict=True)
    return x, Cache(all_keys, all_values, cache.index + x.shape[1])


def cache_arrays(num_layers: int) -> int:
    """How many arrays hold a cache's keys, and as many its values: as many layers as the decoding program has.

    Args:
      num_layers: L.
    """
    if num_layers < _DEEP.get(platform(), num_layers + 1):
        return num_layers
    return next(n for n in range(_A_TURN, 0, -1) if num_layers % n == 0)


def split_layers(layers: Params, arrays: int) -> tuple[Params, ...]:
    """Parameters as decoding reads them, without the stack being cut for every token.

    Args:
      layers: stacked [L, ...].
      arrays: A, of the cache.

    Returns:
      A trees: each layer's own, or, where there are more layers, every A-th layer stacked [L / A, ...].
    """
    every = len_of(layers) // arrays
    return tuple(jax.tree.map(lambda x, i=i: x[i] if every == 1 else x[i::arrays], layers) for i in range(arrays))


def run_prefill(
    layer: Layer, layers: Params, x: jax.Array, given: LayerInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All layers, with the keys and values of each, [L, B, K, T, H]; arguments as `run_layers`."""
    kept = []
    for stack in stacks(layers):
        own = stack.layers, _numbers(given, stack)
        x, grown = jax.lax.scan(lambda x, own: layer(own[0], x, given.of_layer(own[1])), x, own)
        kept.append(grown)
    keys, values = kept[0] if len(kept) == 1 else (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
    return x, keys, values


def _in_few_bits(layers: Params) -> bool:
    """Whether kernels are quantised: of layers one by one a CPU's compiler keeps each that it has made."""
    return any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(layers))


def _numbers(given: LayerInputs, stack: Stack) -> dict[str, Any]:
    """Those of a stack's layers."""
    if all(len(x) == len_of(stack.layers) for x in given.numbers.values()):
        return given.numbers
    return {name: x[stack.start : stack.stop] for name, x in given.numbers.items()}


def _each(layers: Params | tuple[Params, ...], numbers: dict[str, Any]) -> list[tuple[Params, dict[str, Any]]]:
    """Each layer's parameters and numbers. Split in one operation, so that the gradient is one concatenation."""
    if not isinstance(layers, tuple):
        layers = tuple(own for stack in stacks(layers) for own in _apart(stack.layers))
    return [(own, {name: x[i] for name, x in numbers.items()}) for i, own in enumerate(layers)]


def _apart(layers: Params) -> list[Params]:
    leaves, structure = jax.tree.flatten(layers)
    parts = [[x.squeeze(0) for x in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
    return [jax.tree.unflatten(structure, own) for own in zip(*parts, strict=True)]
