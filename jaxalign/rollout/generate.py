"""Completions of left-padded prompts: the prompts once, then one token of every row at a time, from a cache.

The devices' part is `jaxalign.rollout.slots`; `jaxalign.rollout.engine` is the way from text to text.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.transformer import Model
from jaxalign.ops.precision import at_least_float32
from jaxalign.rollout.slots import Prefilled, Rollout, advance, empty_rollout, lay_out, move, prefill, seat
from jaxalign.types import Array, CausalByIndex, Params, Readouts, Rows

GROWTH = 64  # columns that a cache is given to grow by, at least, where so many tokens can come
_NARROWEST = 32  # completions are cut to no less


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
) -> tuple[Rollout, int]:
    """Samples completions until every row has stopped or has `max_new_tokens`.

    Arguments as `generate`; the memory of `prefilled` is given back.

    Returns:
      The completions, and how many tokens the longest has: the steps that were taken.
    """
    chex.assert_rank([sample_ids, prefilled.hidden], [1, 3])
    batch, column = sample_ids.shape[0], prefilled.keys.shape[3]
    laid = lay_out(model, params)
    done, width = 0, cache_width(column + min(max_new_tokens, GROWTH))
    slots = seat(prefilled, sample_ids, width=width)
    for x in (prefilled.keys, prefilled.values, prefilled.hidden):
        x.delete()
    dtype = at_least_float32(slots.hidden).dtype
    rollout = empty_rollout(batch=batch, length=max_new_tokens, dtype=dtype)
    while True:
        slots, rollout, steps, live = advance(
            model,
            laid,
            slots,
            rollout,
            key,
            np.int32(done),
            np.int32(min(max_new_tokens - done, width - column)),
            np.int32(0),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=stop_ids,
        )
        done, column = done + int(steps), column + int(steps)
        if not int(live):
            return rollout, done
        width = cache_width(column + min(max_new_tokens - done, GROWTH))
        slots = move(slots, 0, width=width)


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
    """Samples one completion of each prompt, or several: the prompts once, then a loop that ends when every row has.

    A row's completion is a function of (params, its prompt, key, its sample id): not of its slot, its neighbours,
    the padding or the mesh, but for rounding in the logits.

    Args:
      model: the policy.
      params: its parameters, on the mesh or not.
      rows: left-padded prompts [B, P]; the last token of every row is real.
      key: of the run or the iteration (`jax.random.key`).
      sample_ids: int32 [B], one per completion wanted, or [B * S] for S of each prompt, neighbours; a negative one
        marks an unused row, which stays empty.
      max_new_tokens: R, the most tokens a completion can have, its stop token included.
      temperature: 0 for the likeliest token always.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      stop_ids: the tokens that end a row.

    Returns:
      The completions, R wide.
    """
    return decode(
        model,
        params,
        prefill(model, params, rows),
        key,
        sample_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
    )[0]


def few_sizes(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is enough: few programs for any sizes.

    >>> [few_sizes(n) for n in (1, 3, 5, 7, 9, 13, 100, 130)]
    [1, 3, 6, 8, 12, 16, 128, 192]
    """
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power


def cache_width(columns: int) -> int:
    """The least number of columns that caches are made of and that is enough.

    >>> [cache_width(n) for n in (1, 17, 24, 25, 192)]
    [16, 24, 24, 32, 192]
    """
    return max(few_sizes(columns), 16)


def trimmed(rollout: Rollout, longest: int) -> Rollout:
    """The columns of a rollout up to its longest completion, rounded up to a quarter of all: four programs at most.

    Args:
      rollout: R wide.
      longest: tokens of its longest completion.
    """
    most = rollout.tokens.shape[1]
    width = completion_width(longest, most)
    return rollout if width == most else _cut(rollout, width=width)


def completion_width(longest: int, most: int) -> int:
    """Columns that completions are given.

    Args:
      longest: tokens of the longest.
      most: that it can have.

    >>> [completion_width(n, 128) for n in (1, 33, 64, 97, 128)], completion_width(3, 40)
    ([32, 64, 64, 128, 128], 32)
    """
    quarters = (max(-(-most * i // 32) * 8, _NARROWEST) for i in (1, 2, 3))
    return next((w for w in quarters if longest <= w < most), most)


@functools.partial(jax.jit, static_argnames=("width",))
def _cut(rollout: Rollout, *, width: int) -> Rollout:
    return rollout._replace(
        tokens=rollout.tokens[:, :width], mask=rollout.mask[:, :width], logprobs=rollout.logprobs[:, :width]
    )


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
        causal=CausalByIndex(),
    )
    rows = rows._replace(causal=CausalByIndex())
    whole = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), rows, completion)
    readouts = Readouts(source=here - 1, target=completion.tokens, completion=jnp.zeros_like(here), mask=mask)
    return whole, readouts
