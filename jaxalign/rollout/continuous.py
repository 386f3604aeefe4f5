"""Completions of prompts: of any number in lists on the host, or of a batch of rows on the devices.

Either way `jaxalign.rollout.driver` decodes.  `continue_prompts` reads prompts packed in full rows, the
shortest first, each once however many completions it gets; `roll_out` takes left-padded rows as they lie.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.rows import Layout, Shape, build_batch
from jaxalign.data.tokenize import Example
from jaxalign.models.transformer import Model
from jaxalign.parallel.sharding import batch_part, put_batch
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.driver import Decoder, OnTokens, Ready, groups_of, side_by_side, whole_shards
from jaxalign.rollout.host import all_rows
from jaxalign.rollout.layout import place_of
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.sizes import cache_width, completion_width, few_sizes, power_of_two
from jaxalign.rollout.slots import Prefilled
from jaxalign.types import Array, Params, Rows

_ROW = 256  # columns that prompts are read in, at least where there are so many: shorter rows fill less well


class Sampled(NamedTuple):
    """One completion."""

    ids: list[int]  # the stop token included
    logprob: float  # nats, summed, at the sampling temperature (1 where that is 0)


class _Wanted(NamedTuple):
    """A prompt and the numbers of its completions."""

    prompt: np.ndarray
    samples: list[int]


def _by_length(prompts: Sequence[np.ndarray], num_samples: int) -> list[_Wanted]:
    """What is wanted of each prompt, equal ones together, the shortest first."""
    wanted: dict[bytes, _Wanted] = {}
    for i, prompt in enumerate(prompts):
        own = wanted.setdefault(prompt.tobytes(), _Wanted(prompt, []))
        own.samples.extend(range(i * num_samples, (i + 1) * num_samples))
    return sorted(wanted.values(), key=lambda w: len(w.prompt))


def _in_rows(wanted: list[_Wanted], width: int) -> list[list[_Wanted]]:
    """Prompts packed in rows of so many columns."""
    rows: list[list[_Wanted]] = []
    room = 0
    for own in wanted:
        if len(own.prompt) > room:
            rows.append([])
            room = width
        rows[-1].append(own)
        room -= len(own.prompt)
    return rows


def _plan(wanted: list[_Wanted], groups: int, times: int, columns: int) -> tuple[list[list[list[_Wanted]]], int, int]:
    """Each group's rows of prompts, and in how many rows of how many columns all are read, in about so many times."""
    lengths = [len(w.prompt) for w in wanted]
    width = max(cache_width(lengths[-1]), min(cache_width(sum(lengths)), _ROW))
    if columns:
        width = power_of_two(max(lengths[-1], columns))
    dealt = [_in_rows(wanted[i::groups], width) for i in range(groups)]
    return dealt, few_sizes(-(-max(len(rows) for rows in dealt) // times)), width


class _Lists:
    """Completions that are wanted, by the length of their prompts, and the prompts of the next ones, read ahead."""

    def __init__(self, read: Callable[[Rows], Prefilled], rows: list[list[_Wanted]], shape, columns: int, mesh):
        self._read, self._mesh, self._shape, self._columns = read, mesh, shape, columns
        self._waiting = deque(rows)
        self.ready: deque[Ready] = deque()
        self.prefilled: Prefilled | None = None
        self.window = 0  # columns that hold each prompt that has been read
        self.seconds = 0.0  # spent in reading

    def __bool__(self) -> bool:
        return bool(self._waiting or self.ready)

    def read(self) -> None:
        """Reads the next rows of prompts, if none are left that have been read."""
        if self.ready or not self._waiting:
            return
        start = time.perf_counter()
        self.prefilled = None  # its memory is free before the next are read
        height, width = self._shape
        rows: list[list[Example]] = []
        while self._waiting and len(rows) < height:
            end = 0
            for prompt, samples in self._waiting[0]:
                end += len(prompt)
                self.ready.extend(Ready(len(rows), end, len(prompt), s, s) for s in samples)
            rows.append([Example(own.samples[0], own.prompt, (), (), (), 1.0, 0.0) for own in self._waiting.popleft()])
        self.window = min(cache_width(power_of_two(max(self._columns, *(r.length for r in self.ready)))), width)
        part, parts = (0, 1) if self._mesh is None else batch_part(self._mesh)
        own = height // parts
        layout, shape = Layout("none"), Shape(own, width, 0, width)
        given = build_batch(rows[part * own : (part + 1) * own], shape, layout, 0).rows
        if self._mesh is not None:
            given = put_batch(given, self._mesh)
        self.prefilled = self._read(given)
        self.seconds += time.perf_counter() - start


class _Batch:
    """Completions of prompts that have been read already, one of each row."""

    def __init__(self, prefilled: Prefilled, ready: Sequence[Ready]):
        self.prefilled: Prefilled | None = prefilled
        self.ready = deque(ready)
        self.window = prefilled.keys.shape[3]
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self.ready)

    def read(self) -> None:
        pass


def continue_prompts(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    num_samples: int = 1,
    num_slots: int,
    mesh: Mesh | None = None,
    tensor: int | None = None,
    held: int | None = None,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    columns: int = 0,
    on_tokens: OnTokens | None = None,
) -> tuple[list[Sampled], dict[str, float]]:
    """Samples completions of any number of prompts.

    A completion is a function of (params, its prompt, key, its number): not of the slots or of the others.

    Args:
      model: the policy.
      params: its parameters; with a mesh, on it.
      prompts: int32 token ids, at least one each; equal ones are read once.
      key: of the run (`jax.random.key`).
      num_samples: completions of each prompt; that of prompt i and sample s has the number i * num_samples + s.
      num_slots: completions at a time, at most.
      mesh: where it runs; None: one device.
      tensor: devices that split each layer in decoding; None: as few as fit.
      held: bytes that are on each device meanwhile; None: the parameters alone.
      sampling: how, and how many tokens at most.
      stop_ids: the tokens that end a completion.
      columns: that prompts are given at least, and then powers of two: few programs for a dialogue that grows.
      on_tokens: is called with a completion's number and its new tokens every few steps; a single completion's in this
        thread.

    Returns:
      The completions by number, and figures: `tokens_per_second`, `slot_occupancy`, `time/prefill`, `time/decode`.
    """
    begin = time.perf_counter()
    total = len(prompts) * num_samples
    if not total:
        return [], {}
    num_slots = min(power_of_two(total), num_slots)
    wanted = _by_length(prompts, num_samples)
    widest = cache_width(max(len(wanted[-1].prompt), columns) + sampling.max_new_tokens)
    place = place_of(model, params, mesh, tensor, held, slots=num_slots, columns=widest)
    num_slots, groups = place.slots(num_slots), groups_of(num_slots, mesh)
    groups = min(groups, len(wanted))
    dealt, height, width = _plan(wanted, groups, -(-total // num_slots), columns)
    shape = (height if mesh is None else whole_shards(height, mesh), width)
    laid, key = place.lay_out(model, params), place.there(key)

    def read(rows: Rows) -> Prefilled:
        return place.read(model, params, rows)

    def work(rows: list[list[_Wanted]], stop: threading.Event) -> tuple[_Lists, Decoder]:
        queue = _Lists(read, rows, shape, columns, mesh)
        decoder = Decoder(model, laid, key, num_slots // groups, place.decoding, sampling, stop_ids, on_tokens)
        decoder.run(queue, stop)
        return queue, decoder

    done = side_by_side(work, dealt, place.decoding)
    completions = {number: decoder.completion(number) for _, decoder in done for number in decoder.pieces}
    found = [Sampled(ids.tolist(), float(logprobs.sum())) for ids, logprobs in (completions[n] for n in range(total))]
    reading = sum(queue.seconds for queue, _ in done) / groups
    return found, _figures(completions, [decoder for _, decoder in done], reading, begin)


def roll_out(
    model: Model,
    params: Params,
    rows: Rows,
    key: jax.Array,
    sample_ids: Array,
    *,
    num_slots: int | None = None,
    mesh: Mesh | None = None,
    tensor: int | None = None,
    held: int | None = None,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> tuple[Rollout, dict[str, float]]:
    """Samples one completion of each prompt of a batch, or several: the prompts are read once.

    A row's completion is a function of (params, its prompt, key, its sample id): not of its slot, its neighbours,
    the padding or the mesh, but for rounding in the logits.

    Args:
      model: the policy.
      params: its parameters; with a mesh, on it.
      rows: left-padded prompts [B, P]; the last token of every row is real.
      key: of the run or the iteration (`jax.random.key`).
      sample_ids: int32 [B], one per completion wanted, or [B * S] for S of each prompt, neighbours; a negative one
        marks an unused row, which stays empty.
      num_slots: completions at a time, at most; None: all of them.
      mesh: where it runs; None: one device.
      tensor: devices that split each layer in decoding; None: as few as fit.
      held: bytes that are on each device meanwhile; None: the parameters alone.
      sampling: how, and how many tokens at most.
      stop_ids: the tokens that end a row.

    Returns:
      The completions, as wide as `completion_width` makes the longest, and figures as `continue_prompts` gives, and the
      `tensor` that was chosen.
    """
    begin = time.perf_counter()
    ids, begins = all_rows(sample_ids), all_rows(rows.attend_start)[:, -1]
    total, width = len(ids), rows.tokens.shape[1]
    num_slots = total if num_slots is None else min(num_slots, total)
    widest = cache_width(width + sampling.max_new_tokens)
    place = place_of(model, params, mesh, tensor, held, slots=num_slots, columns=widest)
    num_slots, key = place.slots(num_slots), place.there(key)
    prefilled = place.read(model, params, rows)
    laid = place.lay_out(model, params)
    reading = time.perf_counter() - begin
    copies = total // len(begins)
    lengths = np.repeat(width - begins, copies)
    groups = groups_of(num_slots, mesh)
    ready = [Ready(n // copies, width, int(lengths[n]), n, int(ids[n])) for n in np.flatnonzero(ids >= 0).tolist()]
    queues = [_Batch(prefilled, ready[i::groups]) for i in range(groups)]
    together = groups == 1 and num_slots == total
    if not together:
        del prefilled  # its memory is free when no queue needs it

    def work(queue: _Batch, stop: threading.Event) -> Decoder:
        decoder = Decoder(model, laid, key, num_slots // groups, place.decoding, sampling, stop_ids)
        if together:
            queue.ready.clear()
            decoder.seat(queue.prefilled, ids, lengths)
        decoder.run(queue, stop)
        return decoder

    done = side_by_side(work, queues, place.decoding)
    completions = {number: decoder.completion(number) for decoder in done for number in decoder.pieces}
    figures = _figures(completions, done, reading, begin) | {"tensor": place.tensor}
    longest = max((len(tokens) for tokens, _ in completions.values()), default=0)
    wide = completion_width(longest, sampling.max_new_tokens)
    dtype = np.result_type(np.float32, *(x.dtype for _, x in list(completions.values())[:1]))
    tokens, mask, logprobs = (np.zeros((total, wide), d) for d in (np.int32, bool, dtype))
    finished = np.zeros(total, bool)
    for number, (of_row, nats) in completions.items():
        here = slice(len(of_row))
        tokens[number, here], mask[number, here], logprobs[number, here] = of_row, True, nats
        finished[number] = of_row[-1] in stop_ids
    rollout = Rollout(tokens, mask, mask, logprobs, finished)
    if mesh is None:
        return jax.tree.map(jnp.asarray, rollout), figures
    part, parts = batch_part(mesh)
    own = total // parts
    return put_batch(jax.tree.map(lambda x: x[part * own : (part + 1) * own], rollout), mesh), figures


def _figures(completions: dict[int, Any], done: list[Decoder], reading: float, begin: float) -> dict[str, float]:
    """How a run went."""
    tokens, seconds = sum(len(ids) for ids, _ in completions.values()), time.perf_counter() - begin
    return {
        "tokens_per_second": tokens / seconds,
        "slot_occupancy": tokens / max(sum(decoder.slot_steps for decoder in done), 1),
        "time/prefill": reading,
        "time/decode": seconds - reading,
    }
