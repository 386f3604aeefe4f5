"""Slots: rows of a batch that decode prompts which have been read, token by token, from a cache.

    laid = lay_out(model, params)                       # once per rollout, see `jaxalign.rollout.layout`
    prefilled = prefill(model, params, rows)
    slots = seat(prefilled, sample_ids, width=...)      # or `refill`, of some slots of a batch that is decoding
    slots, draws, steps = advance(model, laid, slots, draws, key, ...)
    slots = move(slots, shift, width=...)               # another number of columns
    slots = gather(slots, rows)                         # fewer rows

All rows write to one column of the cache, so that a token is one write in place.  A prompt is put before the column at
which the batch stands, wherever that is, and `start` says where its row begins: attention never sees what is before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.models.cache import Cache, in_ring, rings, slot_counts
from jaxalign.models.schedule import split_layers
from jaxalign.models.transformer import Model
from jaxalign.ops.logits import logits
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.sharding import ambient_shards, constrain
from jaxalign.rollout.sampling import Sampling, sample, token_keys
from jaxalign.types import Array, CausalByIndex, Params, Rows

_UNSEEN = 4  # steps between two counts of the rows that are left, where devices must tell each other


class Draws(NamedTuple):
    """What some steps of all slots sampled."""

    tokens: Array  # int32 [B, N], 0 where the mask is False
    mask: Array  # bool [B, N], the row was live
    logprobs: Array  # at least float32 [B, N], nats, at the sampling temperature, 0 where the mask is False


class Prefilled(NamedTuple):
    """Rows of prompts that have been read: what decoding starts from."""

    keys: Array  # [L, B, K, P, H]
    values: Array  # [L, B, K, P, H]
    hidden: Array  # [B, P, D]
    positions: Array  # int32 [B, P]
    start: Array  # int32 [B, P], column of the first token of the same prompt


class Slots(NamedTuple):
    """Rows that are decoded; `cache.index` is the column that the next token of each is written to."""

    cache: Cache
    hidden: Array  # [B, D], from which the next token is sampled
    position: Array  # int32 [B], of the token that `hidden` read
    start: Array  # int32 [B], column of the first prompt token
    place: Array  # int32 [B], tokens sampled so far
    sample_ids: Array  # int32 [B]
    live: Array  # bool [B], False for a row that has ended or never began


@functools.partial(jit, static_argnames=("model",))
def prefill(model: Model, params: Params, rows: Rows) -> Prefilled:
    """Reads prompts.

    Args:
      model: the policy.
      params: its parameters.
      rows: prompts [B, P], one of each row, padded on the left, for `seat`; or several, packed, for
        `refill`.
    """
    chex.assert_rank([rows.tokens, rows.attend_start], 2)
    hidden, keys, values = model.prefill(params, rows._replace(causal=CausalByIndex()))
    return by_slots(Prefilled(keys, values, hidden, rows.positions, rows.attend_start))


@jax.jit
def by_slots(prefilled: Prefilled) -> Prefilled:
    """Prompts that have been read, split over the ambient mesh as slots are."""
    rest = (constrain(x, "batch", *[None] * (x.ndim - 1)) for x in prefilled[2:])
    return Prefilled(_by_heads(prefilled.keys), _by_heads(prefilled.values), *rest)


def repeat_rows(tree: Any, copies: int) -> Any:
    """Each row of arrays [B, ...] so many times, one after the other: on a mesh nothing moves between devices."""
    return tree if copies == 1 else jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), tree)


@functools.partial(jax.jit, static_argnames=("width", "arrays", "windows"))
def seat(
    prefilled: Prefilled, sample_ids: Array, *, width: int, arrays: int, windows: tuple[int | None, ...] | None = None
) -> Slots:
    """Slots for prompts, in their order: one for each, or as many neighbours as it has sample ids.

    Args:
      prefilled: the prompts [B, P], one of each row; its last token is real.
      sample_ids: int32 [B * S], S for each prompt; a negative one marks an unused row.
      width: columns of the cache, at least P.
      arrays: of the cache, as many as `lay_out` gives trees of layers.
      windows: of the layers, whose columns are all that a layer keeps; None: it keeps all.
    """
    columns = prefilled.keys.shape[3]
    copies = sample_ids.shape[0] // prefilled.hidden.shape[0]
    sizes = slot_counts(windows, width, arrays)

    def padded(x, size):
        room = [(0, 0)] * (x.ndim - 2) + [(0, size - columns), (0, 0)]
        kept = in_ring(x, columns, size) if size < columns else jnp.pad(x, room)
        return jnp.repeat(kept, copies, axis=x.ndim - 4)

    keys, values = (tuple(map(padded, split_layers(x, arrays), sizes)) for x in (prefilled.keys, prefilled.values))
    last = (x[:, -1] for x in (prefilled.hidden, prefilled.positions, prefilled.start))
    hidden, position, start = repeat_rows(tuple(last), copies)
    return _on_mesh(
        Slots(
            cache=Cache(keys, values, jnp.int32(columns)),
            hidden=hidden,
            position=position,
            start=start,
            place=jnp.zeros_like(start),
            sample_ids=jnp.asarray(sample_ids, jnp.int32),
            live=jnp.asarray(sample_ids) >= 0,
        )
    )


@functools.partial(jax.jit, static_argnames=("model", "batch", "width", "arrays"))
def empty_slots(model: Model, index: Array | int, *, batch: int, width: int, arrays: int) -> Slots:
    """Slots without work.

    Args:
      model: the policy.
      index: the column at which they stand.
      batch: B.
      width: columns of the cache.
      arrays: of the cache, as many as `lay_out` gives trees of layers.
    """
    c = model.config
    stacked = () if arrays == c.num_layers else (c.num_layers // arrays,)
    sizes = slot_counts(c.windows, width, arrays)
    none = {size: jnp.zeros((*stacked, batch, c.num_kv_heads, size, c.head_dim), c.dtype) for size in sizes}
    each = tuple(none[size] for size in sizes)
    zero = jnp.zeros(batch, jnp.int32)
    return _on_mesh(
        Slots(
            cache=Cache(each, each, jnp.asarray(index, jnp.int32)),
            hidden=jnp.zeros((batch, c.embed_dim), c.dtype),
            position=zero,
            start=zero,
            place=zero,
            sample_ids=zero - 1,
            live=jnp.zeros(batch, bool),
        )
    )


@functools.partial(jax.jit, static_argnames=("window", "windows"), donate_argnames=("slots",))
def refill(
    slots: Slots,
    prefilled: Prefilled,
    rows: Array,
    sources: Array,
    ends: Array,
    sample_ids: Array,
    count: Array | int,
    *,
    window: int,
    windows: tuple[int | None, ...] | None = None,
) -> Slots:
    """Puts prompts into some of the slots; the others continue.

    Args:
      slots: at a column no less than `window`.
      prefilled: rows of prompts [Q, P].
      rows: int32 [B], the slots to fill.
      sources: int32 [B], the row of `prefilled` that each slot's prompt is in; several may share one.
      ends: int32 [B], one past the prompt's last column there.
      sample_ids: int32 [B], of each.
      count: how many of these are meant, the first ones.
      window: columns that are copied, as many as the longest prompt has and at most P.
      windows: of the layers, as `seat` takes them.
    """
    index = slots.cache.index
    ring = rings(windows, [x.shape[-2] for x in slots.cache.keys])

    def at(*indices):
        return tuple(jnp.asarray(i, jnp.int32) for i in indices)

    def put(old, new):
        """One row of a vector."""
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], at(row, *[0] * (old.ndim - 1)))

    def one(i, slots):
        nonlocal row
        row, source, end = rows[i], sources[i], ends[i]
        first = jnp.maximum(end - window, 0)

        def layer(number, old, new):
            stacked = old.shape[:-4]  # layers, where the array is of several
            new = new.reshape(-1, len(slots.cache.keys), *new.shape[1:])
            part = jax.lax.dynamic_slice(
                new, at(0, number, source, 0, first, 0), (len(new), 1, 1, new.shape[3], window, new.shape[5])
            )
            # The prompt's last column comes last; what is before its first, another prompt's, is never seen.
            part = jnp.roll(part.reshape(*stacked, *part.shape[2:]), first + window - end, axis=-2)
            if ring[number]:  # nothing else of the row is seen again
                part, before = in_ring(part, index, old.shape[-2]), 0
            else:
                before = index - window
            where = at(*[0] * len(stacked), row, 0, before, 0)
            return jax.lax.dynamic_update_slice(old, part.astype(old.dtype), where)

        keys = tuple(layer(n, old, prefilled.keys) for n, old in enumerate(slots.cache.keys))
        values = tuple(layer(n, old, prefilled.values) for n, old in enumerate(slots.cache.values))
        hidden, position, start = (x[source, end - 1] for x in prefilled[2:])
        return Slots(
            cache=Cache(keys, values, index),
            hidden=put(slots.hidden, hidden),
            position=put(slots.position, position),
            start=put(slots.start, index - end + start),
            place=put(slots.place, jnp.int32(0)),
            sample_ids=put(slots.sample_ids, sample_ids[i]),
            live=put(slots.live, jnp.bool_(True)),
        )

    row: Any = None
    return _on_mesh(jax.lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), one, slots))


def move(slots: Slots, shift: int, *, width: int, windows: tuple[int | None, ...] | None = None) -> Slots:
    """The same rows in a cache of other columns, one array at a time; the old cache is used up.

    Args:
      slots: to be moved.
      shift: by how many columns to the left; not more than lie before every live row.
      width: columns of the new cache, at least those of the old one.
      windows: of the layers, as `seat` takes them.
    """
    shift = jnp.int32(shift)
    sizes = slot_counts(windows, width, len(slots.cache.keys))

    def moved(layers):
        out = []
        for x, size in zip(layers, sizes, strict=True):
            out.append(_shift(x, shift) if x.shape[-2] == size else _widen(x, shift, width=size))
            if not x.is_deleted():
                x.delete()
        return tuple(out)

    cache = slots.cache
    start, index = _shifted(slots.start, cache.index, shift)
    return slots._replace(start=start, cache=Cache(moved(cache.keys), moved(cache.values), index))


@functools.partial(jax.jit, static_argnames=("width",))
def _widen(x: Array, shift: Array, *, width: int) -> Array:
    return _rolled(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, width - x.shape[-2]), (0, 0)]), shift)


@functools.partial(jax.jit, donate_argnames=("x",))
def _shift(x: Array, shift: Array) -> Array:
    return _rolled(x, shift)


def _rolled(x: Array, shift: Array) -> Array:
    # What wraps around is outside every live row's interval; in a ring it lies where it belongs.
    return _by_heads(jnp.roll(x, -shift, axis=-2))


@jax.jit
def _shifted(start: Array, index: Array, shift: Array) -> tuple[Array, Array]:
    return constrain(jnp.maximum(start - shift, 0), "batch"), index - shift  # a row that has ended may be gone


def gather(slots: Slots, rows: Array, *, shards: int = 1) -> Slots:
    """Some of the rows in a cache of their own, one array at a time; the old cache is used up.

    Args:
      slots: B rows.
      rows: int32 [N], which they are; with several shards, the n-th part of the numbers is of the n-th part of the
        rows, so that nothing moves between devices.
      shards: that the rows lie on.
    """

    def gathered(layers):
        out = []
        for x in layers:
            out.append(_take_rows(x, rows, shards=shards))
            x.delete()
        return tuple(out)

    keys, values = gathered(slots.cache.keys), gathered(slots.cache.values)
    rest = (_take_rows(x, rows, shards=shards) for x in slots[1:])
    return Slots(Cache(keys, values, slots.cache.index), *rest)


@functools.partial(jax.jit, static_argnames=("shards",))
def _take_rows(x: Array, rows: Array, *, shards: int) -> Array:
    axis = max(x.ndim - 4, 0)  # of an array of several layers the second
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    local = jnp.asarray(rows).reshape(shards, -1) - jnp.arange(shards)[:, None] * (x.shape[axis] // shards)
    parts = x.reshape(*before, shards, -1, *after)
    take = jax.vmap(lambda part, index: jnp.take(part, index, axis=axis, mode="clip"), (axis, 0), axis)
    found = take(parts, local).reshape(*before, -1, *after)
    return _by_heads(found) if x.ndim >= 4 else constrain(found, "batch", *[None] * (x.ndim - 1))


@functools.partial(jax.jit, static_argnames=("batch", "length", "dtype"))
def empty_draws(*, batch: int, length: int, dtype: Any) -> Draws:
    """No tokens yet.

    Args:
      batch: B.
      length: N.
      dtype: of the log-probs.
    """
    return _by_rows(
        Draws(
            tokens=jnp.zeros((batch, length), jnp.int32),
            mask=jnp.zeros((batch, length), bool),
            logprobs=jnp.zeros((batch, length), dtype),
        )
    )


@functools.partial(
    jit,
    static_argnames=("model", "sampling", "stop_ids"),
    donate_argnames=("slots", "draws"),
)
def advance(
    model: Model,
    params: Params,
    slots: Slots,
    draws: Draws,
    key: Array,
    steps: Array | int,
    floor: Array | int,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> tuple[Slots, Draws, Array]:
    """Samples up to `steps` tokens of every live row, and ends earlier where few rows are left: at once, or a few steps
    later where rows lie on several devices.

    Args:
      model: the policy.
      params: its parameters as `lay_out` gives them.
      slots: with at least `steps` columns left.
      draws: what is sampled is written there, from the first column on.
      key: of the run or the iteration.
      steps: at most.
      floor: it ends where no more rows than this are live.
      sampling: temperature, most tokens of a completion, and so on.
      stop_ids: the tokens that end a row.

    Returns:
      slots, draws, steps that were taken.
    """
    head = model.head(params)
    stops = jnp.asarray(stop_ids, jnp.int32)
    batch = slots.live.shape[0]

    def more(carry):
        step, slots, _ = carry
        return (step < steps) & (jnp.sum(slots.live, dtype=jnp.int32) > floor)

    def few(carry):
        end = jnp.minimum(carry[0] + every, steps)
        return jax.lax.while_loop(lambda carry: carry[0] < end, body, carry)

    def body(carry):
        step, slots, draws = carry
        keys = token_keys(key, slots.sample_ids, slots.place)
        token, logprob = sample(
            logits(slots.hidden, head),
            keys,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            num_tokens=sampling.num_tokens,
        )
        live = slots.live
        token, logprob = jnp.where(live, token, 0), jnp.where(live, logprob, 0)
        stopped = live & (token[:, None] == stops).any(-1)
        where = (jnp.int32(0), step)
        draws = Draws(
            *(
                jax.lax.dynamic_update_slice(old, new[:, None], where)
                for old, new in zip(draws, (token, live, logprob), strict=True)
            )
        )
        # Rows that have ended walk on, unseen; where positions are a table's, they stay within it.
        place, position = slots.place + live, slots.position + (1 if model.config.num_positions is None else live)
        row = Rows(
            tokens=token[:, None],
            positions=position[:, None],
            attend_start=slots.start[:, None],
            attend_end=jnp.broadcast_to(slots.cache.index + 1, (batch, 1)),
        )
        hidden, cache, _ = model.apply(params, row, slots.cache)
        assert cache is not None
        live = live & ~stopped & (place < sampling.max_new_tokens)
        slots = slots._replace(cache=cache, hidden=hidden[:, -1], position=position, place=place, live=live)
        return step + 1, _on_mesh(slots), draws

    carry = (jnp.int32(0), slots, _by_rows(draws))
    every = _UNSEEN if ambient_shards() > 1 else 1
    step, slots, draws = jax.lax.while_loop(more, few if every > 1 else body, carry)
    return _on_mesh(slots), _by_rows(draws), step


def _by_rows(draws: Draws) -> Draws:
    """Rows over the batch axes: left alone, the compiler may split them like the head."""
    return Draws(*(constrain(x, "batch", *[None] * (x.ndim - 1)) for x in draws))


def _on_mesh(slots: Slots) -> Slots:
    """Rows over the batch axes, heads over `tensor`."""
    keys, values = (tuple(map(_by_heads, layers)) for layers in (slots.cache.keys, slots.cache.values))
    rest = (constrain(x, "batch", *[None] * (x.ndim - 1)) for x in slots[1:])
    return Slots(Cache(keys, values, slots.cache.index), *rest)


def _by_heads(x: Array) -> Array:
    """An array of the cache: rows over the batch axes, heads over `tensor`."""
    return constrain(x, *[None] * (x.ndim - 4), "batch", "tensor", None, None)
