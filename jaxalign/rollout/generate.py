"""Completions of left-padded prompts: the prompts once, then one token of every row at a time, from a cache.

Everything here runs on the mesh under `jax.jit`; `jaxalign.rollout.engine` is the way from text to text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.models.cache import Cache, init_cache
from jaxalign.models.transformer import Model
from jaxalign.ops.precision import at_least_float32, product_precision
from jaxalign.parallel.sharding import constrain
from jaxalign.rollout.sampling import sample, token_keys
from jaxalign.types import Array, Params, Readouts, Rows


class Rollout(NamedTuple):
    """Sampled completions, one per row."""

    tokens: Array  # int32 [B, R], 0 after the end
    mask: Array  # bool [B, R], the completion's tokens, its stop token included
    logprobs: Array  # float32 [B, R], nats, at the sampling temperature, 0 where the mask is False
    finished: Array  # bool [B], ended by a stop token


class Prefilled(NamedTuple):
    """Prompts that have been read: what decoding starts from."""

    cache: Cache
    hidden: Array  # [B, D], of the last prompt token
    position: Array  # int32 [B], of the last prompt token
    start: Array  # int32 [B], cache slot of the first prompt token


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def prefill(model: Model, params: Params, rows: Rows, *, max_new_tokens: int) -> Prefilled:
    """Reads left-padded prompts into a cache with room for their completions.

    Args:
      model: the policy.
      params: its parameters.
      rows: prompts [B, P]; the last token of every row is real.
      max_new_tokens: R, at least 1.
    """
    chex.assert_rank(list(rows), 2)
    batch, width = rows.tokens.shape
    cache = init_cache(model.config, batch, width + max_new_tokens - 1, model.config.dtype)
    hidden, cache, _ = model.apply(params, None, rows, _on_mesh(cache))
    last = Prefilled(_on_mesh(cache), hidden[:, -1], rows.positions[:, -1], rows.attend_start[:, -1])
    return last._replace(
        hidden=constrain(last.hidden, "batch", None),
        position=constrain(last.position, "batch"),
        start=constrain(last.start, "batch"),
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "temperature", "top_k", "top_p", "stop_ids"),
    donate_argnames=("prefilled",),
)
def decode(
    model: Model,
    params: Params,
    prefilled: Prefilled,
    key: Array,
    sample_ids: Array,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_ids: tuple[int, ...],
) -> tuple[Rollout, Prefilled]:
    """Samples completions until every row has stopped or has `max_new_tokens`; the cache is used up.

    Arguments as `generate`.

    Returns:
      The completions, and what is left of `prefilled` (so that its memory is used again; it cannot be continued).
    """
    chex.assert_rank([sample_ids, prefilled.hidden], [1, 2])
    batch, length = sample_ids.shape[0], max_new_tokens
    head = model.head(params)
    stops = jnp.asarray(stop_ids, jnp.int32)
    width = prefilled.cache.keys[0].shape[2] - max_new_tokens + 1

    def choose(hidden, position):
        wide = at_least_float32(hidden).dtype
        logits = jnp.dot(hidden, head, precision=product_precision(hidden.dtype), preferred_element_type=wide)
        keys = token_keys(key, sample_ids, position)
        return sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)

    def write(rollout, hidden, position):
        """Adds the token at `position` to the rows that have not ended."""
        token, logprob = choose(hidden, position)
        live = ~rollout.finished
        token, logprob = jnp.where(live, token, 0), jnp.where(live, logprob, 0)
        column = (jnp.int32(0), position)
        return Rollout(
            tokens=jax.lax.dynamic_update_slice(rollout.tokens, token[:, None], column),
            mask=jax.lax.dynamic_update_slice(rollout.mask, live[:, None], column),
            logprobs=jax.lax.dynamic_update_slice(rollout.logprobs, logprob[:, None], column),
            finished=rollout.finished | (token[:, None] == stops).any(-1),
        ), token

    def more(carry):
        position, rollout, *_ = carry
        return (position < length) & ~jnp.all(rollout.finished)

    def step(carry):
        position, rollout, token, cache = carry
        row = Rows(
            tokens=token[:, None],
            positions=(prefilled.position + position)[:, None],
            attend_start=prefilled.start[:, None],
            attend_end=jnp.full((batch, 1), width + position, jnp.int32),
        )
        hidden, cache, _ = model.apply(params, None, row, cache)
        rollout, token = write(rollout, hidden[:, -1], position)
        return position + 1, rollout, token, _on_mesh(cache)

    used = sample_ids >= 0
    dtype = at_least_float32(prefilled.hidden).dtype
    empty = Rollout(
        tokens=jnp.zeros((batch, length), jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        logprobs=jnp.zeros((batch, length), dtype),
        finished=~used,  # an unused row has ended before it starts
    )
    rollout, token = write(_by_rows(empty), prefilled.hidden, jnp.int32(0))
    _, rollout, _, cache = jax.lax.while_loop(more, step, (jnp.int32(1), rollout, token, prefilled.cache))
    rollout = _by_rows(rollout._replace(finished=rollout.finished & used))
    return rollout, prefilled._replace(cache=_on_mesh(cache))


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature", "top_k", "top_p", "stop_ids"))
def generate(
    model: Model,
    params: Params,
    rows: Rows,
    key: Array,
    sample_ids: Array,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """Samples one completion of each prompt: the prompts once, then a loop that ends when every row has.

    A row's completion is a function of (params, its prompt, key, its sample id): not of its slot, its neighbours,
    the padding or the mesh, but for rounding in the logits.

    Args:
      model: the policy.
      params: its parameters, on the mesh or not.
      rows: left-padded prompts [B, P]; the last token of every row is real.
      key: of the run or the iteration (`jax.random.key`).
      sample_ids: int32 [B], one per completion wanted; a negative one marks an unused row, which stays empty.
      max_new_tokens: R, the most tokens a completion can have, its stop token included.
      temperature: 0 for the likeliest token always.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      stop_ids: the tokens that end a row.

    Returns:
      The completions, R wide.
    """
    prefilled = prefill(model, params, rows, max_new_tokens=max_new_tokens)
    return decode(
        model,
        params,
        prefilled,
        key,
        sample_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
    )[0]


def completed_rows(rows: Rows, rollout: Rollout) -> tuple[Rows, Readouts]:
    """Prompts and their completions as rows of training: [pad .. prompt | completion .. pad].

    Args:
      rows: the prompts [B, P].
      rollout: their completions, R wide.

    Returns:
      Rows [B, P + R], and readouts [B, R]: the completion's token m is predicted from row index P - 1 + m.
    """
    chex.assert_rank([rows.tokens, rollout.tokens], 2)
    batch, width = rows.tokens.shape
    length = rollout.tokens.shape[1]
    here = jnp.broadcast_to(width + jnp.arange(length, dtype=jnp.int32), (batch, length))
    position = rows.positions[:, -1:] + 1 + jnp.arange(length, dtype=jnp.int32)
    mask = rollout.mask
    completion = Rows(
        tokens=jnp.where(mask, rollout.tokens, 0),
        positions=jnp.where(mask, position, 0),
        attend_start=jnp.where(mask, rows.attend_start[:, -1:], here),  # padding sees itself
        attend_end=here + 1,
    )
    whole = Rows(*(jnp.concatenate(pair, axis=1) for pair in zip(rows, completion, strict=True)))
    readouts = Readouts(source=here - 1, target=completion.tokens, completion=jnp.zeros_like(here), mask=mask)
    return whole, readouts


def _by_rows(rollout: Rollout) -> Rollout:
    """Completions over the batch axes: left alone, the compiler may split them like the head."""
    return Rollout(*(constrain(x, "batch", *[None] * (x.ndim - 1)) for x in rollout))


def _on_mesh(cache: Cache) -> Cache:
    """Rows of the cache over the batch axes, its heads over `tensor`."""
    keys, values = (
        tuple(constrain(x, "batch", "tensor", None, None) for x in layers) for layers in (cache.keys, cache.values)
    )
    return cache._replace(keys=keys, values=values)
