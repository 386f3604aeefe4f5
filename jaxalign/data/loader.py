"""The dataset of a run: batches by index, each a function of (seed, index)."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.config import max_length
from jaxalign.data import packing, report
from jaxalign.data.cache import TokenStore, digest, digest_records, digest_tokenizer, open_or_write
from jaxalign.data.dialogues import render_plain
from jaxalign.data.limits import Limits
from jaxalign.data.omissions import with_system_turns
from jaxalign.data.prefetch import prefetch
from jaxalign.data.records import Notes, Record, check_skipped
from jaxalign.data.rows import Layout, Shape, Sizes, build_batch, build_prompts, round_up, segment_tokens
from jaxalign.data.split import held_out
from jaxalign.data.tokenize import LOST, Dropped, Encoder, Example, tokenize_records
from jaxalign.data.widths import prompt_widths, width_of
from jaxalign.errors import InputError
from jaxalign.types import Batch

_READOUT = {"sft": "tokens", "dpo": "tokens", "reward": "last", "ppo": "none"}
_TOKEN_MULTIPLE = 64  # rows of training tokens are a multiple of this, unless max_length is smaller
_PROMPT_MULTIPLE = 8  # rows of prompts, which completions are added to
_READOUT_MULTIPLE = 8
_NEEDS = "needs: "  # counts: before the name of a limit, what the longest record needs of it
_SKIPPED = "skipped: "  # counts: before the reason why records cannot be rendered


class DataStreamError(RuntimeError):
    """A batch that could not be made; says which, of which records, and why."""


class Dataset:
    """Records as batches.

    Attributes:
      purpose: sft, reward, dpo or ppo.
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
        purpose: str,
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
        self.purpose, self.pad_id, self.batch_size = purpose, pad_id, batch_size
        self.layout = Layout(_READOUT[purpose], shared_prompt)
        self.num_records = len(selection)
        self.fingerprint = digest(store.meta["key"], np.ascontiguousarray(selection, np.int64).tobytes())
        self._seed, self._shuffle, self._packed = seed, shuffle, packed and purpose != "ppo"
        sizes = self._example_sizes()
        self._sizes = Sizes(*(a[selection] for a in sizes))
        self.shape: Shape = self._choose_shape(sizes, row_length, max_row_length, None if like is None else like.shape)
        self.widths: tuple[int, ...] = (self.shape.length,)
        if purpose == "ppo":
            known = like is not None and like.shape == self.shape
            self.widths = like.widths if known else prompt_widths(sizes.tokens, batch_size, self.shape.length)
        self._plans: dict[int, packing.PackingPlan] = {}
        self._lock = threading.Lock()
        first = self._make_plan(0, None)
        self._num_rows = packing.rows_per_epoch(first) if self._packed else first.num_rows
        self.batches_per_epoch = -(-self._num_rows // batch_size)
        self.report: dict[str, Any] = {}
        self.records_digest = ""

    # ---- building ------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        config,
        tokenizer,
        purpose: str,
        split: str = "train",
        *,
        eos_ids: Sequence[int] = (),
        like: Dataset | None = None,
    ) -> Dataset | None:
        """Reads, tokenises (or finds in the cache) and lays out the data of a stage.

        Args:
          config: a stage's configuration.
          tokenizer: a `transformers` tokenizer with its chat template in place.
          purpose: sft, reward, dpo or ppo.
          split: "train", or "eval": eval_sources where given, else the share eval_fraction of the records, which
            "train" then leaves out.
          eos_ids: ids beside the tokenizer's own that end a completion.
          like: the training dataset, for "eval": its batch shape is taken where the data fits it, so that nothing
            is compiled anew, and the report counts what both hold.

        Returns:
          The dataset; None for "eval" where the configuration has none.

        Raises:
          InputError: for sources, columns, records or limits that leave nothing to train on.
        """
        from jaxalign.data.mixture import load_records

        data = config.data
        if split == "eval" and not data.eval_sources and not data.eval_fraction:
            return None
        own_sources = split == "eval" and bool(data.eval_sources)
        sources = data.eval_sources if own_sources else data.sources
        records, tally = load_records(
            sources,
            purpose,
            seed=config.seed,
            max_records=None if own_sources else data.max_records,
            field="data.eval_sources" if own_sources else "data.sources",
            on_error=data.on_error,
            max_skipped=data.max_skipped,
        )
        return cls.from_records(
            records, config, tokenizer, purpose, split, eos_ids=eos_ids, like=like, tally=tally.to_dict()
        )

    @classmethod
    def from_records(
        cls,
        records: Sequence[Record],
        config,
        tokenizer,
        purpose: str,
        split: str = "train",
        *,
        eos_ids: Sequence[int] = (),
        like: Dataset | None = None,
        tally: dict[str, Any] | None = None,
    ) -> Dataset:
        """As `build`, from records that are already there."""
        data = config.data
        encoder = Encoder(tokenizer, eos_ids, render_plain)
        records = _without_system_turns(records, data.system_turns)
        limits = _limits(config, purpose, encoder)
        options = {
            "train_on": data.get("train_on", "completion"),
            "train_on_eos": data.get("train_on_eos", "turn"),
            "append_eos": bool(data.get("append_eos", False)),
            "on_error": data.on_error,
        }
        shared_prompt = bool(data.get("shared_prompt", True))
        row_length = data.row_length if purpose != "ppo" else None
        pairs = purpose in ("reward", "dpo")
        max_row_length = row_length or limits.max_length * (2 if pairs else 1)

        def examples(counts: Notes) -> Iterator[tuple[Record, Example]]:
            made = tokenize_records(records, encoder, purpose, **options, notes=counts)
            for record, example in zip(records, made, strict=True):
                result = example if isinstance(example, Dropped) else limits.apply(example, counts)
                if not isinstance(result, Dropped):
                    lengths: list[np.ndarray | int] = [len(c) for c in result.completions]
                    needed = segment_tokens(len(result.prompt), lengths, shared_prompt)
                    if purpose != "ppo" and needed > max_row_length:
                        result = Dropped(record.index, "longer than row_length", (("row_length", int(needed)),))
                if isinstance(result, Dropped) and result.wrong:
                    counts.add(_SKIPPED + result.reason, record)
                elif isinstance(result, Dropped):
                    counts[f"dropped: {result.reason}"] += 1
                    for field, length in result.needs:
                        counts[_NEEDS + field] = max(counts[_NEEDS + field], length)
                else:
                    yield record, result

        content, sources = digest_records(records)
        key = digest(
            purpose,
            [content, sources],
            digest_tokenizer(tokenizer, encoder.prefix, encoder.eos_ids),
            limits,
            options,
            [shared_prompt, max_row_length],
        )
        store = open_or_write(_cache_dir(config), key, examples)
        tally = _completed(tally or {"read": len(records), "dropped": {}}, store, encoder)
        check_skipped(
            {name.removeprefix(_SKIPPED): n for name, n in store.meta["counts"].items() if name.startswith(_SKIPPED)},
            len(records),
            data.max_skipped,
            "data.sources",
            tally["examples"],
        )
        if not len(store):
            raise _nothing_left(len(records), store.meta["counts"], config)
        fraction = 0.0 if data.eval_sources else data.eval_fraction
        selection = held_out(store.table["group"], fraction, config.seed, split)
        dataset = cls(
            store,
            selection,
            purpose=purpose,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=bool(data.shuffle) and split == "train",
            packed=bool(data.packing),
            shared_prompt=shared_prompt,
            row_length=row_length,
            max_row_length=max_row_length,
            pad_id=_pad_id(tokenizer),
            like=like,
        )
        dataset.records_digest = content
        train = like if split == "eval" else None
        plain = sum(map(_is_dialogue, records)) if encoder.template.is_plain else 0
        dataset.report = report.data_report(dataset, tally, train, plain)
        return dataset

    def _example_sizes(self) -> Sizes:
        """Of both splits: they share one shape."""
        table = self._store.table
        pairs = self.purpose in ("reward", "dpo")
        prompt, completions = table["prompt"], table["completions"]
        slots = [completions[:, 0], completions[:, 1]] if pairs else [completions[:, 0]]
        counts = np.full(len(table), 2 if pairs else 1, np.int64)
        readouts = {"tokens": table["scored"].sum(1, dtype=np.int64), "last": counts, "none": 0 * counts}
        return Sizes(segment_tokens(prompt, slots, self.layout.shared_prompt), readouts[self.layout.readout], counts)

    def _choose_shape(self, sizes: Sizes, row_length: int | None, max_row_length: int, like: Shape | None) -> Shape:
        need = [int(a.max()) for a in sizes]
        if like is not None and all(n <= size for n, size in zip(need, like[1:], strict=True)):
            return Shape(self.batch_size, *like[1:])
        if self.purpose == "ppo":
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
        """int [N]: which of the examples made from the records are this split's."""
        return self._selection

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, those that fill up the last batch aside."""
        return self._num_rows

    def fill(self) -> float:
        """Share of tokens that are not padding, over an epoch of whole batches (the first, where they differ)."""
        if len(self.widths) == 1:
            columns = self.batches_per_epoch * self.shape.length
        else:
            columns = sum(self._width(self.members(i)) for i in range(self.batches_per_epoch))
        return float(self._sizes.tokens.sum() / (columns * self.batch_size))

    def counts(self) -> dict[str, int]:
        """What tokenisation and limits left out or cut, over both splits."""
        return {name: n for name, n in self._store.meta["counts"].items() if not name.startswith(_NEEDS)}

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
        """Record ids of each row of batch `index`; fewer rows than batch_size at the end of an epoch."""
        epoch, within = divmod(index, self.batches_per_epoch)
        plan = self.plan(epoch)
        first = within * self.batch_size
        return [plan.row(r) for r in range(first, min(first + self.batch_size, plan.num_rows))]

    def is_whole(self, index: int) -> bool:
        """Whether batch `index` is full: the last one of an epoch may have rows to spare."""
        return len(self.members(index)) == self.batch_size

    def _width(self, rows: list[np.ndarray]) -> int:
        """Columns of a batch of prompts: every process says the same, whatever its part of the rows."""
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
            if self.purpose == "ppo":
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


def _without_system_turns(records: Sequence[Record], how: str) -> Sequence[Record]:
    """Records whose system turns are folded into the user's or dropped, as `data.system_turns` says."""
    if how == "keep":
        return records

    def changed(record: Record) -> Record:
        fields = ("messages", "prompt", "completion", "chosen", "rejected")
        lists = {name: value for name in fields if isinstance(value := getattr(record, name), list)}
        parts: dict[str, Any] = {name: with_system_turns(value, how) for name, value in lists.items()}
        return record._replace(**parts)

    return [changed(record) for record in records]


def _completed(tally: dict[str, Any], store: TokenStore, encoder: Encoder) -> dict[str, Any]:
    """The sources' tally with what tokenisation found: records skipped, words lost, markers, damage."""
    counts, places = store.meta["counts"], store.meta["places"]
    named = {name: n for name, n in counts.items() if name.startswith((_SKIPPED, LOST))}
    skipped = {name.removeprefix(_SKIPPED): n for name, n in named.items() if name.startswith(_SKIPPED)}
    lost = {name.removeprefix(LOST): n for name, n in named.items() if name.startswith(LOST)}
    examples = {name.removeprefix(_SKIPPED).removeprefix(LOST): found for name, found in places.items()}
    warnings = list(tally.get("warnings", ()))
    if store.damage:
        warnings.append(f"the cache of tokens in {store.directory} was damaged ({store.damage}) and is made again")
    return {
        **tally,
        "skipped": {**tally.get("skipped", {}), **skipped},
        "examples": {**tally.get("examples", {}), **examples},
        "warnings": warnings,
        "lost": lost,
        "markers": encoder.template.split_markers() if any(map(_is_dialogue, store.sample())) else {},
    }


def _is_dialogue(record: Record) -> bool:
    """Whether a record needs a template: one of its fields is a list of messages."""
    return isinstance(record.messages, list) or isinstance(record.prompt, list)


def _limits(config, purpose: str, encoder: Encoder) -> Limits:
    data, longest = config.data, max_length(config)
    if purpose != "ppo":
        return Limits(longest, data.max_prompt_length, data.max_completion_length, data.truncation, encoder.bos_id)
    room = longest - config.rollout.max_new_tokens
    return Limits(room, data.max_prompt_length, None, data.truncation, encoder.bos_id)


def _cache_dir(config) -> Path:
    chosen = config.data.cache_dir or (config.workdir and os.path.join(config.workdir, "cache"))
    if not chosen or "://" in chosen:  # memory maps need a local file
        return Path(tempfile.gettempdir()) / f"jaxalign-cache-{os.getuid()}"
    return Path(chosen)


def _pad_id(tokenizer) -> int:
    chosen = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in chosen if i is not None)


def _nothing_left(num_records: int, counts: dict[str, int], config) -> InputError:
    data, prefix = config.data, "dropped: "
    dropped = {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}
    reasons = ", ".join(f"{reason} ({n})" for reason, n in sorted(dropped.items(), key=lambda item: -item[1]))
    needs = {name.removeprefix(_NEEDS): n for name, n in counts.items() if name.startswith(_NEEDS)}
    if "max_length" in needs and config.algorithm.name == "ppo":
        needs["max_length"] += config.rollout.max_new_tokens
    fix = " ".join(f"--config.data.{field}={length}" for field, length in needs.items())
    if fix and data.truncation == "drop":
        fix += " or --config.data.truncation=keep_start"
    return InputError(
        f"no usable record among {num_records}: {reasons or 'the sources are empty'}",
        "at least one",
        fix or "other records in the files of data.sources, or columns that hold what is to be learned",
    )
