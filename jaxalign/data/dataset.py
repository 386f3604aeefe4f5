"""The dataset of a run: batches by index, each a function of (seed, index).  `build.py` makes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxalign.data import packing
from jaxalign.data.cache import TokenStore, digest
from jaxalign.data.prefetch import prefetch
from jaxalign.data.records import Record
from jaxalign.data.rows import Layout, Shape, Sizes, build_batch, build_prompts, round_up, segment_tokens
from jaxalign.data.tokenize import Example
from jaxalign.data.widths import prompt_widths, width_of
from jaxalign.errors import InputError
from jaxalign.registry import Reads
from jaxalign.types import Batch

_TOKEN_MULTIPLE = 64  # rows of training tokens are a multiple of this, unless max_length is smaller
_PROMPT_MULTIPLE = 8  # rows of prompts, which completions are added to
_READOUT_MULTIPLE = 8
NEEDS = "needs: "  # prefix in counts: the limit that the longest record would need, by name


class DataStreamError(RuntimeError):
    """A batch could not be made; with its index, the record and the reason."""


class Dataset:
    """Records as batches.

    Attributes:
      reads: the forms of the records, and what is read out of them.
      shape: the one shape of every batch of every epoch; of prompts to sample from, the widest.
      widths: row lengths that batches have; several for prompts to sample from, else one.
      layout: how examples become segments.
      pad_id: token of padding.
      num_records: records of this split.
      batches_per_epoch: the same for every epoch.
      fingerprint: digest of the split's tokens; changes where any token, mask or order of records does.
      records_digest: digest of all records that were read, both splits'.
      report: what was read, dropped and truncated, lengths, padding; JSON values.
    """

    def __init__(
        self,
        store: TokenStore,
        selection: np.ndarray,
        *,
        reads: Reads,
        batch_size: int,
        seed: int,
        shuffle: bool,
        packed: bool,
        shared_prompt: bool,
        row_length: int | None,
        max_row_length: int,
        pad_id: int,
        like: Dataset | None = None,
    ):
        self._store, self._selection = store, selection
        self.reads, self.pad_id, self.batch_size = reads, pad_id, batch_size
        self.layout = Layout(reads.readout, shared_prompt and int(store.table["count"].max()) > 1)
        self._prompts = reads.readout == "none"  # one row each, as wide as the batch's longest
        self.num_records = len(selection)
        self.fingerprint = digest(store.meta["key"], np.ascontiguousarray(selection, np.int64).tobytes())
        self._seed, self._shuffle, self._packed = seed, shuffle, packed and not self._prompts
        sizes = self._example_sizes()
        self._sizes = Sizes(*(a[selection] for a in sizes))
        self.shape: Shape = self._choose_shape(sizes, row_length, max_row_length, None if like is None else like.shape)
        self.widths: tuple[int, ...] = (self.shape.length,)
        if self._prompts:
            known = like is not None and like.shape == self.shape
            self.widths = like.widths if known else prompt_widths(sizes.tokens, batch_size, self.shape.length)
        self._plans: dict[int, packing.PackingPlan] = {}
        self._lock = threading.Lock()
        first = self._make_plan(0, None)
        self._num_rows = packing.rows_per_epoch(first) if self._packed else first.num_rows
        self.batches_per_epoch = -(-self._num_rows // batch_size)
        self.report: dict[str, Any] = {}
        self.records_digest = ""

    def _example_sizes(self) -> Sizes:
        """Sizes of the examples of both splits, which share one shape."""
        table = self._store.table
        prompt, completions = table["prompt"], table["completions"]
        slots = [completions[:, slot] for slot in range(int(table["count"].max()))]
        counts = np.maximum(table["count"], 1).astype(np.int64)
        readouts = {"tokens": table["scored"].sum(1, dtype=np.int64), "last": counts, "none": 0 * counts}
        return Sizes(segment_tokens(prompt, slots, self.layout.shared_prompt), readouts[self.layout.readout], counts)

    def _choose_shape(self, sizes: Sizes, row_length: int | None, max_row_length: int, like: Shape | None) -> Shape:
        need = [int(a.max()) for a in sizes]
        if like is not None and all(n <= size for n, size in zip(need, like[1:], strict=True)):
            return Shape(self.batch_size, *like[1:])
        if self._prompts:
            return Shape(self.batch_size, min(round_up(need[0], _PROMPT_MULTIPLE), max_row_length), 0, 1)
        if self._packed:
            return Shape(self.batch_size, *packing.choose_capacity(sizes, row_length, max_row_length, self._seed))
        length = row_length or min(round_up(need[0], _TOKEN_MULTIPLE), max_row_length)
        readouts = round_up(need[1], _READOUT_MULTIPLE) if self.layout.readout == "tokens" else need[1]
        return Shape(self.batch_size, length, readouts, need[2])

    # ---- reading -------------------------------------------------------------------------------------------

    def record(self, i: int) -> Record:
        """The record behind `record_ids` i, with its columns."""
        return self._store.record(int(self._selection[i]))

    def example(self, i: int) -> Example:
        """The example behind `record_ids` i."""
        return self._store.example(int(self._selection[i]), i)

    def lengths(self) -> dict[str, np.ndarray]:
        """int [N] each: "prompt" and, by completion slot, "completions" [N, 2], "scored" [N, 2], "complete" [N, 2]."""
        table = self._store.table[self._selection]
        return {name: table[name] for name in ("prompt", "completions", "scored", "complete", "score", "weight")}

    def keys(self, name: str) -> np.ndarray:
        """uint64 [N]: "digest" of each example's tokens, "prompt_key", or "group" of what shares a prompt or origin."""
        return self._store.table[name][self._selection]

    @property
    def selection(self) -> np.ndarray:
        """int [N]: indices of this split's examples in the cache."""
        return self._selection

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, without the padding rows of the last batch."""
        return self._num_rows

    def fill(self) -> float:
        """Share of tokens that are not padding, over the first epoch."""
        if len(self.widths) == 1:
            columns = self.batches_per_epoch * self.shape.length
        else:
            columns = sum(self._width(self.members(i)) for i in range(self.batches_per_epoch))
        return float(self._sizes.tokens.sum() / (columns * self.batch_size))

    def counts(self) -> dict[str, int]:
        """How many records tokenisation and limits dropped or truncated, over both splits."""
        return {name: n for name, n in self._store.meta["counts"].items() if not name.startswith(NEEDS)}

    def plan(self, epoch: int) -> packing.PackingPlan:
        """Which examples share a row in an epoch, in the order of the rows."""
        with self._lock:
            if epoch not in self._plans:
                if len(self._plans) > 1:
                    self._plans.pop(min(self._plans))
                self._plans[epoch] = self._make_plan(epoch, self._num_rows)
            return self._plans[epoch]

    def _make_plan(self, epoch: int, num_rows: int | None) -> packing.PackingPlan:
        if not self._packed:
            order = packing.permutation(self.num_records, self._seed, epoch, self._shuffle)
            return packing.PackingPlan(order, np.arange(self.num_records + 1, dtype=np.int64))
        return packing.plan_epoch(
            self._sizes, self.shape[1:], seed=self._seed, epoch=epoch, shuffle=self._shuffle, num_rows=num_rows
        )

    def members(self, index: int) -> list[np.ndarray]:
        """Record ids of each row of batch `index`; fewer than batch_size rows at the end of an epoch."""
        epoch, within = divmod(index, self.batches_per_epoch)
        plan = self.plan(epoch)
        first = within * self.batch_size
        return [plan.row(r) for r in range(first, min(first + self.batch_size, plan.num_rows))]

    def is_whole(self, index: int) -> bool:
        """Whether batch `index` has no padding rows, as the last of an epoch may."""
        return len(self.members(index)) == self.batch_size

    def _width(self, rows: list[np.ndarray]) -> int:
        """Row length of a batch of prompts: the same in every process."""
        return width_of(int(max(self._sizes.tokens[row].max() for row in rows)), self.widths)

    def batch(self, index: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's rows of batch `index`.

        Args:
          index: of the batch in the whole stream of epochs.
          process_index: rows are dealt to processes in blocks, in order.
          process_count: divides batch_size.

        Returns:
          numpy arrays of batch_size / process_count rows; rows beyond the epoch's end are padding.
        """
        if self.batch_size % process_count:
            raise InputError(
                f"batch_size {self.batch_size} for {process_count} processes",
                "as many rows for each process",
                f"--config.batch_size={round_up(self.batch_size, process_count)}",
            )
        local = self.batch_size // process_count
        whole = self.members(index)
        rows = whole[process_index * local : (process_index + 1) * local]
        examples = [[self._example_or_error(index, int(i)) for i in row] for row in rows]
        shape = self.shape._replace(rows=local)
        try:
            if self._prompts:
                shape = shape._replace(length=self._width(whole))
                return build_prompts([row[0] for row in examples], shape, self.pad_id)
            return build_batch(examples, shape, self.layout, self.pad_id)
        except Exception as error:
            raise DataStreamError(f"batch {index}: {error}") from error

    def _example_or_error(self, index: int, i: int) -> Example:
        try:
            return self.example(i)
        except Exception as error:
            raise DataStreamError(f"batch {index}, record {i}: {type(error).__name__}: {error}") from error

    def batches(
        self, start: int, stop: int | None, process_index: int = 0, process_count: int = 1, *, depth: int = 2
    ) -> Iterator[tuple[int, Batch]]:
        """(index, batch) from `start` on, made ahead by a thread.

        Raises:
          DataStreamError: in place of a batch that cannot be made, with the record and the reason.
        """
        return prefetch(lambda i: self.batch(i, process_index, process_count), start, stop, depth=depth)
