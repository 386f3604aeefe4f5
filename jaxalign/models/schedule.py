"""How layers run: scanned with a rematerialisation policy, one by one on a CPU, from a cache, or filling one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxalign.models.cache import Cache, Seen
from jaxalign.models.layer_inputs import KeysValues, LayerInputs
from jaxalign.ops.attention_blocked import SAVED
from jaxalign.ops.platform import platform
from jaxalign.ops.readout import take_sources
from jaxalign.ops.rope import computed_once
from jaxalign.parallel.host_memory import DEVICE, HOST
from jaxalign.types import Params

Layer = Callable[[Params, jax.Array, LayerInputs], tuple[jax.Array, KeysValues]]

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


def run_layers(
    layer: Layer,
    layers: Params,
    x: jax.Array,
    given: LayerInputs,
    sources: jax.Array | None,
    *,
    remat: str,
) -> jax.Array:
    """All layers, one behind the other.

    Args:
      layer: (params of a layer, x, given) -> (x, its keys and values).
      layers: their parameters, stacked [L, ...].
      x: [B, T, D].
      given: what every layer receives, numbers [L] of each.
      sources: int32 [B, M], the tokens that are read; None: all of them.
      remat: what the backward pass recomputes, a key of `_POLICIES` or "none".

    Returns:
      [B, T, D], of sources [B, M, D].
    """
    if platform() == "cpu" and remat == "none" and _num_layers(layers) <= _UNROLLED:
        return _one_by_one(layer, layers, x, given, sources)

    def body(x, own):
        return layer(own[0], x, given.of_layer(own[1]))[0], None

    if remat != "none":
        # Inside a scan nothing is merged across the checkpoint anyway, so its barriers would only cost.
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    x, _ = jax.lax.scan(body, x, (layers, given.numbers))
    return x if sources is None else take_sources(x, sources)


def _one_by_one(layer: Layer, layers: Params, x: jax.Array, given: LayerInputs, sources: jax.Array | None) -> jax.Array:
    *others, (last, numbers) = _each(layers, given.numbers)
    given = given._replace(rotation=computed_once(given.rotation))
    for own, own_numbers in others:
        x, _ = layer(own, x, given.of_layer(own_numbers))
    # What the last layer makes of a token is seen by no other: only those that are read go through it.
    few = sources is not None and 4 * sources.shape[1] <= 3 * x.shape[1]
    x, _ = layer(last, x, given.of_layer(numbers)._replace(queries=sources if few else None))
    return x if sources is None or few else take_sources(x, sources)


def run_cached(layer: Layer, layers: Params, x: jax.Array, given: LayerInputs, cache: Cache) -> tuple[jax.Array, Cache]:
    """All layers over T more tokens.

    Each layer by itself: its part of the cache is written in place, and neither that nor its parameters are cut out of
    stacked arrays, which would copy them for every token.

    Args:
      layer: as `run_layers` takes it.
      layers: their parameters, stacked or each layer's own.
      x: [B, T, D].
      given: what every layer receives.
      cache: of the earlier tokens.

    Returns:
      [B, T, D] and the cache with the new tokens.
    """
    grown = []
    for (own, numbers), keys, values in zip(_each(layers, given.numbers), cache.keys, cache.values, strict=True):
        x, kept = layer(own, x, given.of_layer(numbers)._replace(seen=Seen(keys, values, cache.index)))
        grown.append(kept)
    all_keys, all_values = zip(*grown, strict=True)
    return x, Cache(all_keys, all_values, cache.index + x.shape[1])


def run_prefill(
    layer: Layer, layers: Params, x: jax.Array, given: LayerInputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All layers, with the keys and values of each, [L, B, K, T, H]; arguments as `run_layers`."""
    x, (keys, values) = jax.lax.scan(
        lambda x, own: layer(own[0], x, given.of_layer(own[1])), x, (layers, given.numbers)
    )
    return x, keys, values


def _num_layers(layers: Params) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _each(layers: Params | tuple[Params, ...], numbers: dict[str, Any]) -> list[tuple[Params, dict[str, Any]]]:
    """Each layer's own parameters and numbers; the gradient puts theirs side by side in one go."""
    if not isinstance(layers, tuple):
        leaves, structure = jax.tree.flatten(layers)
        cut = [[x.squeeze(0) for x in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
        layers = tuple(jax.tree.unflatten(structure, own) for own in zip(*cut, strict=True))
    return [(own, {name: x[i] for name, x in numbers.items()}) for i, own in enumerate(layers)]
