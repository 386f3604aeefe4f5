"""The decode driver: slots that the host refills, moves and compacts, and the devices decode.

The host plans and the devices work: all slots decode, without the host, until some have ended or the cache
is full; then those that are free take the next prompts.  Where no prompt waits and half of the slots are free, the rows
that are left move together: a step then costs what so many rows cost.

The matmuls of decoding are too small for more than one core of a CPU: there the slots work in groups, each in a thread
of its own on prompts of its own, dealt out ahead, so that a run does the same whichever thread is the faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.models.ropes import check_stated
from jaxalign.models.transformer import Model
from jaxalign.ops.precision import at_least_float32
from jaxalign.parallel.mesh import batch_shards
from jaxalign.rollout.host import all_rows
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.sizes import cache_width
from jaxalign.rollout.slots import Prefilled, advance, empty_draws, empty_slots, gather, move, refill, seat
from jaxalign.types import Params

GROWTH = 64  # columns that a cache is given to grow by, at least, where so many tokens can come
MOST_STEPS = 128  # between two looks of the host
_STREAMED_STEPS = 4  # the same where someone reads along
_IDLE = 8  # one in so many slots may wait for its next prompt: refilling costs time too
_GROUP = 8  # slots of a CPU's thread, at least, since each thread reads all weights: two of 8 are 1.3x one of 16
_FEWEST = 8  # slots that rows move together to, at least: with fewer a step is hardly cheaper
_WORTH = 32  # tokens that a row may have left, at least, where rows move together


OnTokens = Callable[[int, np.ndarray], None]  # number of a completion, its new tokens


class Ready(NamedTuple):
    """A completion whose prompt has been read."""

    source: int  # row of `prefilled`
    end: int  # one past the prompt's last column there
    length: int  # of the prompt
    number: int  # of the completion
    sample_id: int  # that its keys are made from


class Queue(Protocol):
    """Completions that are wanted; true while there are any."""

    ready: deque[Ready]  # whose prompts have been read
    prefilled: Prefilled | None
    window: int  # columns that hold each prompt that has been read

    def __bool__(self) -> bool: ...

    def read(self) -> None:
        """Reads the next prompts, if none are left that have been read."""


class Decoder:
    """The slots, and what the host knows of them."""

    def __init__(
        self,
        model: Model,
        params: Params,
        key: jax.Array,
        num_slots: int,
        mesh: Mesh | None,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        on_tokens: OnTokens | None = None,
    ):
        """
        Args:
          model: the policy.
          params: its parameters as `lay_out` gives them.
          key: of the run or the iteration.
          num_slots: completions at a time.
          mesh: where it runs; None: one device.
          sampling: how, and how many tokens at most.
          stop_ids: the tokens that end a completion.
          on_tokens: is called with a completion's new tokens every few steps.
        """
        self._model, self._params, self._key = model, params, key
        self._limit = sampling.max_new_tokens
        self._options: dict[str, Any] = {"sampling": sampling, "stop_ids": stop_ids}
        self._on_tokens, self._steps = on_tokens, _STREAMED_STEPS if on_tokens else MOST_STEPS
        self._shards = 1 if mesh is None else batch_shards(mesh)
        self._arrays = len(params["layers"])  # of the cache, too
        self._windows: dict[str, Any] = {"windows": model.config.windows}
        self._slots: Any = None
        self._column = self._width = 0
        self._number = np.full(num_slots, -1)  # of the completion; -1: free
        self._start = np.zeros(num_slots, np.int64)  # column of the first prompt token
        self._place = np.zeros(num_slots, np.int64)  # tokens sampled so far
        self.pieces: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # number -> tokens and log-probs
        self.slot_steps = 0  # that were taken, of all slots together

    @property
    def live(self) -> np.ndarray:
        return self._number >= 0

    def run(self, queue: Queue, stop: threading.Event) -> None:
        """Completes all prompts, or returns early where `stop` is set."""
        while (queue or self.live.any()) and not stop.is_set():
            while queue and not self.live.all():
                queue.read()
                self._fill(queue)
            self._advance(bool(queue))

    def seat(self, prefilled: Prefilled, sample_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Gives all slots their prompts at once: nothing moves between devices.

        Args:
          prefilled: one prompt of each row, whose memory is given back.
          sample_ids: of the completions, negative for one that is not wanted.
          lengths: of their prompts.
        """
        self._column = prefilled.keys.shape[3]
        self._width = _wide_enough(self._column, self._limit)
        self._check_ropes(self._width)
        self._slots = seat(
            prefilled, sample_ids.astype(np.int32), width=self._width, arrays=self._arrays, **self._windows
        )
        for x in (prefilled.keys, prefilled.values, prefilled.hidden):
            x.delete()
        self._number = np.where(sample_ids >= 0, np.arange(len(sample_ids)), -1)
        self._start = self._column - lengths.astype(np.int64)

    def _fill(self, queue: Queue) -> None:
        """Gives free slots their next prompts, as many as have been read."""
        free = np.flatnonzero(~self.live)[: len(queue.ready)]
        if not len(free):
            return
        self._make_room(queue.window)
        rows, sources, ends, samples = (np.zeros(len(self._number), np.int32) for _ in range(4))
        rows[: len(free)] = free
        for i, row in enumerate(free):
            ready = queue.ready.popleft()
            sources[i], ends[i], samples[i] = ready.source, ready.end, ready.sample_id
            self._number[row], self._start[row], self._place[row] = ready.number, self._column - ready.length, 0
        count = np.int32(len(free))
        self._slots = refill(
            self._slots, queue.prefilled, rows, sources, ends, samples, count, window=queue.window, **self._windows
        )

    def _make_room(self, prompt: int = 0) -> None:
        """At least one column to write, and `prompt` columns before it; moves the rows where there are not."""
        if self._slots is not None and prompt <= self._column < self._width:
            return
        live = self.live
        span = self._column - self._start[live].min() if live.any() else 0
        column = max(int(span), prompt)
        coming = self._limit if prompt else self._limit - int(self._place[live].min())
        width = max(self._width, _wide_enough(column, coming))
        self._check_ropes(width)
        if self._slots is None:
            self._slots = empty_slots(
                self._model, np.int32(column), batch=len(self._number), width=width, arrays=self._arrays
            )
        else:
            self._slots = move(self._slots, self._column - column, width=width, **self._windows)
        self._start -= self._column - column
        self._column, self._width = column, width

    def _check_ropes(self, width: int) -> None:
        """The model sees no more than the window of a cache where all layers have one."""
        c = self._model.config
        check_stated(c.ropes or (c.rope,), width)

    def _compact(self) -> int:
        """Moves the rows together where that leaves no more than half of the slots.

        Returns:
          How many live rows are few enough for the next time.
        """
        batch, live = len(self._number), self.live
        if self._limit - int(self._place[live].min()) < _WORTH:
            return 0
        of_shard = live.reshape(self._shards, -1)
        size, most, least = batch // self._shards, int(of_shard.sum(axis=1).max()), -(-_FEWEST // self._shards)
        while least <= _half(size) < size and _half(size) >= most:
            size = _half(size)
        if size * self._shards < batch:
            order = np.argsort(~of_shard, axis=1, kind="stable")[:, :size]
            rows = (order + np.arange(self._shards)[:, None] * of_shard.shape[1]).reshape(-1)
            self._slots = gather(self._slots, rows.astype(np.int32), shards=self._shards)
            self._number, self._start, self._place = (x[rows] for x in (self._number, self._start, self._place))
        while least <= _half(size) < size:
            size = _half(size)
            if size * self._shards < live.sum():  # else the rows of one shard are too many, and more must end
                return size * self._shards
        return 0

    def _advance(self, waiting: bool) -> None:
        """Decodes until enough slots are free to be worth refilling, or few rows are left where nothing waits."""
        floor = len(self._number) - max(1, len(self._number) // _IDLE) if waiting else self._compact()
        self._make_room()
        batch, live = len(self._number), self.live
        length = min(self._limit, MOST_STEPS)
        draws = empty_draws(batch=batch, length=length, dtype=at_least_float32(self._slots.hidden).dtype)
        fewest, steps = min(int(live.sum()) - 1, floor), min(length, self._steps, self._width - self._column)
        self._slots, draws, taken = advance(
            self._model, self._params, self._slots, draws, self._key, np.int32(steps), np.int32(fewest), **self._options
        )
        tokens, mask, logprobs, alive = (all_rows(x) for x in (*draws, self._slots.live))
        for row in np.flatnonzero(live):
            number, new = int(self._number[row]), tokens[row][mask[row]]
            self.pieces.setdefault(number, []).append((new, logprobs[row][mask[row]]))
            if self._on_tokens:
                self._on_tokens(number, new)
        self._place += mask.sum(axis=1)
        self._number[~alive] = -1
        self._column += int(taken)
        self.slot_steps += int(taken) * batch

    def completion(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs of a completion."""
        tokens, logprobs = zip(*self.pieces[number], strict=True)
        return np.concatenate(tokens), np.concatenate(logprobs)


def cache_widths(prompt: int, new: int) -> list[tuple[int, int]]:
    """How wide the cache is while completions of one length grow, and how many tokens of each are decoded so.

    Args:
      prompt: columns of the prompts.
      new: tokens of a completion.

    >>> cache_widths(100, 200)
    [(192, 92), (256, 64), (384, 44)]
    """
    found, column = [], prompt
    while column < prompt + new:
        width = _wide_enough(column, prompt + new - column)
        found.append((width, min(width, prompt + new) - column))
        column = width
    return found


def _wide_enough(column: int, coming: int) -> int:
    """Columns of a cache that stands at one of them, where so many tokens can come."""
    return cache_width(column + min(coming, GROWTH))


def side_by_side(work: Callable[..., Any], parts: list[Any], mesh: Mesh | None) -> list[Any]:
    """work(part, stop) for each part, in a thread of its own where there are several.

    `stop` is set when one has failed, or all are interrupted: the others need not continue.
    """
    stop, wide = threading.Event(), jax.config.jax_enable_x64  # type: ignore[attr-defined]

    def settled(part: Any) -> Any:
        with on_mesh(mesh), jax.enable_x64(wide):  # a thread does not have the settings of the one that started it
            return work(part, stop)

    if len(parts) == 1:
        return [settled(parts[0])]
    with ThreadPoolExecutor(len(parts)) as threads:
        started = [threads.submit(settled, part) for part in parts]
        try:
            wait(started, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # who fails or interrupts does not wait for the others' prompts
    return [thread.result() for thread in started]


def _half(n: int) -> int:
    return -(-n // 2)


def groups_of(num_slots: int, mesh: Mesh | None) -> int:
    """How many groups of slots decode in parallel."""
    devices = 1 if mesh is None else mesh.size
    ambient = mesh is None and not jax.sharding.get_abstract_mesh().empty  # that of the caller is not the threads'
    if devices > 1 or ambient or jax.default_backend() != "cpu":
        return 1
    return max(1, min(os.cpu_count() or 1, num_slots // _GROUP))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def whole_shards(rows: int, mesh: Mesh) -> int:
    """The least number of rows, at least `rows`, that a mesh's shards divide."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards
