"""Many completions in few slots: a slot whose row has ended takes the next prompt, while the others continue.

The host plans and the devices work: prompts are read one behind the other in full rows, the shortest first, each once
however many completions it gets; then all slots decode, without a word to the host, until some have ended or the cache
is full.

What decoding multiplies is too small for more than one core of a CPU: there the slots work in groups, each in a thread
of its own on prompts of its own, dealt out ahead, so that a run does the same whichever thread is the faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.rows import Layout, Shape, build_batch
from jaxalign.data.tokenize import Example
from jaxalign.models.transformer import Model
from jaxalign.parallel.mesh import batch_shards
from jaxalign.parallel.sharding import batch_part, put_batch
from jaxalign.rollout.generate import GROWTH, cache_width, few_sizes
from jaxalign.rollout.host import all_rows
from jaxalign.rollout.slots import Prefilled, advance, empty_rollout, empty_slots, lay_out, move, prefill, refill
from jaxalign.types import Params

_ROW = 256  # columns that prompts are read in, at least where there are so many: shorter rows fill less well
_MOST_STEPS = 128  # between two looks of the host
_IDLE = 8  # one in so many slots may wait for its next prompt: refilling costs time too
_GROUP = 8  # slots of a CPU's thread, at least, since each thread reads all weights: two of 8 are 1.3x one of 16


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
    """Prompts one behind the other, in rows of so many columns."""
    rows: list[list[_Wanted]] = []
    room = 0
    for own in wanted:
        if len(own.prompt) > room:
            rows.append([])
            room = width
        rows[-1].append(own)
        room -= len(own.prompt)
    return rows


def _plan(wanted: list[_Wanted], groups: int, times: int) -> tuple[list[list[list[_Wanted]]], int, int]:
    """Each group's rows of prompts, and in how many rows of how many columns all are read, in about so many times."""
    lengths = [len(w.prompt) for w in wanted]
    width = max(cache_width(lengths[-1]), min(cache_width(sum(lengths)), _ROW))
    dealt = [_in_rows(wanted[i::groups], width) for i in range(groups)]
    return dealt, few_sizes(-(-max(len(rows) for rows in dealt) // times)), width


class _Queue:
    """Completions that are wanted, by the length of their prompts, and the prompts of the next ones, read ahead."""

    def __init__(self, model, params, rows: list[list[_Wanted]], shape: tuple[int, int], mesh):
        self._model, self._params, self._mesh, self._shape = model, params, mesh, shape
        self._waiting = deque(rows)
        # Row of `prefilled`, one past the prompt's last column there, its length, the sample.
        self.ready: deque[tuple[int, int, int, int]] = deque()
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
                self.ready.extend((len(rows), end, len(prompt), s) for s in samples)
            rows.append([Example(own.samples[0], own.prompt, (), (), (), 1.0, 0.0) for own in self._waiting.popleft()])
        self.window = min(cache_width(power_of_two(max(length for _, _, length, _ in self.ready))), width)
        part, parts = (0, 1) if self._mesh is None else batch_part(self._mesh)
        own = height // parts
        layout, shape = Layout("none"), Shape(own, width, 0, width)
        given = build_batch(rows[part * own : (part + 1) * own], shape, layout, 0).rows
        if self._mesh is not None:
            given = put_batch(given, self._mesh)
        self.prefilled = jax.block_until_ready(prefill(self._model, self._params, given))
        self.seconds += time.perf_counter() - start


class _Batch:
    """The slots, and what the host knows of them."""

    def __init__(self, model, params, key, num_slots, max_new_tokens, options):
        self._model, self._params, self._key = model, params, key
        self._limit, self._options = max_new_tokens, options
        self._slots: Any = None
        self._column = self._width = 0
        self._sample = np.full(num_slots, -1)  # -1: free
        self._start = np.zeros(num_slots, np.int64)  # column of the first prompt token
        self._place = np.zeros(num_slots, np.int64)  # tokens sampled so far
        self.said: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # sample -> tokens and log-probs, in pieces
        self.steps = 0

    @property
    def live(self) -> np.ndarray:
        return self._sample >= 0

    def fill(self, queue: _Queue) -> None:
        """Gives free slots their next prompts, as many as have been read."""
        free = np.flatnonzero(~self.live)[: len(queue.ready)]
        if not len(free):
            return
        self._make_room(queue.window)
        rows, sources, ends, samples = (np.zeros(len(self._sample), np.int32) for _ in range(4))
        rows[: len(free)] = free
        for i, row in enumerate(free):
            sources[i], ends[i], length, samples[i] = queue.ready.popleft()
            self._sample[row], self._start[row], self._place[row] = samples[i], self._column - length, 0
        count = np.int32(len(free))
        self._slots = refill(self._slots, queue.prefilled, rows, sources, ends, samples, count, window=queue.window)

    def _make_room(self, prompt: int = 0) -> None:
        """At least one column to write, and `prompt` columns before it; moves the rows where there are not."""
        if self._slots is not None and prompt <= self._column < self._width:
            return
        live = self.live
        span = self._column - self._start[live].min() if live.any() else 0
        column = max(int(span), prompt)
        coming = self._limit if prompt else self._limit - int(self._place[live].min())
        width = max(self._width, cache_width(column + min(coming, GROWTH)))
        if self._slots is None:
            self._slots = empty_slots(self._model, np.int32(column), batch=len(self._sample), width=width)
        else:
            self._slots = move(self._slots, self._column - column, width=width)
        self._start -= self._column - column
        self._column, self._width = column, width

    def advance(self, waiting: bool) -> None:
        """Decodes until enough slots are free to be worth refilling, or all where nothing waits."""
        self._make_room()
        batch, live = len(self._sample), self.live
        length = min(self._limit, _MOST_STEPS)
        rollout = empty_rollout(batch=batch, length=length, dtype=_wide(self._slots.hidden))
        floor = min(int(live.sum()) - 1, batch - max(1, batch // _IDLE)) if waiting else 0
        steps = np.int32(min(length, self._width - self._column))
        self._slots, rollout, taken, _ = advance(
            self._model,
            self._params,
            self._slots,
            rollout,
            self._key,
            np.int32(0),
            steps,
            np.int32(floor),
            max_new_tokens=self._limit,
            **self._options,
        )
        tokens, mask, logprobs, goes_on = (all_rows(x) for x in (*rollout[:3], self._slots.live))
        for row in np.flatnonzero(live):
            self.said.setdefault(int(self._sample[row]), []).append((tokens[row][mask[row]], logprobs[row][mask[row]]))
        self._place += mask.sum(axis=1)
        self._sample[~goes_on] = -1
        self._column += int(taken)
        self.steps += int(taken)


def continue_prompts(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    num_samples: int = 1,
    num_slots: int,
    mesh: Mesh | None = None,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...],
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
      max_new_tokens: the most tokens a completion can have, its stop token included.
      temperature: 0 for the likeliest token always.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      stop_ids: the tokens that end a completion.

    Returns:
      The completions by number, and figures: `tokens_per_second`, `slot_occupancy`, `time/prefill`, `time/decode`.
    """
    begin = time.perf_counter()
    total = len(prompts) * num_samples
    if not total:
        return [], {}
    num_slots = min(power_of_two(total), num_slots)
    if mesh is not None:
        num_slots = whole_shards(num_slots, mesh)
    wanted, groups = _by_length(prompts, num_samples), _groups(num_slots, mesh)
    groups = min(groups, len(wanted))
    dealt, height, width = _plan(wanted, groups, times=-(-total // num_slots))
    shape = (height if mesh is None else whole_shards(height, mesh), width)
    num_slots //= groups
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_ids": stop_ids}
    with _on(mesh):
        laid = lay_out(model, params)
    over = threading.Event()

    def work(rows: list[list[_Wanted]]) -> tuple[_Queue, _Batch]:
        """Completes some of the prompts in slots of their own."""
        with _on(mesh):
            queue = _Queue(model, params, rows, shape, mesh)
            batch = _Batch(model, laid, key, num_slots, max_new_tokens, options)
            while (queue or batch.live.any()) and not over.is_set():
                while queue and not batch.live.all():
                    queue.read()
                    batch.fill(queue)
                batch.advance(bool(queue))
        return queue, batch

    if groups == 1:
        done = [work(dealt[0])]
    else:
        with ThreadPoolExecutor(groups) as threads:
            started = [threads.submit(work, rows) for rows in dealt]
            try:
                wait(started, return_when=FIRST_EXCEPTION)
            finally:
                over.set()  # who fails or interrupts does not wait for the others' prompts
        done = [group.result() for group in started]
    said = {number: pieces for _, batch in done for number, pieces in batch.said.items()}
    pieces = [said[n] for n in range(total)]
    found = [Sampled(np.concatenate([t for t, _ in p]).tolist(), sum(float(x.sum()) for _, x in p)) for p in pieces]
    tokens, seconds = sum(len(s.ids) for s in found), time.perf_counter() - begin
    reading = sum(queue.seconds for queue, _ in done) / groups
    return found, {
        "tokens_per_second": tokens / seconds,
        "slot_occupancy": tokens / (sum(batch.steps for _, batch in done) * num_slots),
        "time/prefill": reading,
        "time/decode": seconds - reading,
    }


def _groups(num_slots: int, mesh: Mesh | None) -> int:
    """How many groups of slots work side by side."""
    devices = 1 if mesh is None else mesh.size
    ambient = mesh is None and not jax.sharding.get_abstract_mesh().empty  # that of the caller is not the threads'
    if devices > 1 or ambient or jax.default_backend() != "cpu":
        return 1
    return max(1, min(os.cpu_count() or 1, num_slots // _GROUP))


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def power_of_two(n: int) -> int:
    """The least that is at least n.

    >>> [power_of_two(n) for n in (1, 3, 8)]
    [1, 4, 8]
    """
    return 1 << (n - 1).bit_length()


def whole_shards(rows: int, mesh: Mesh) -> int:
    """The least number of rows, at least `rows`, that a mesh's shards divide."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
