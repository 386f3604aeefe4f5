"""Data that are not here: batches of full rows, as long as the configuration allows, in place of a dataset's."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from jaxalign.config import get, max_length
from jaxalign.data.files import is_url
from jaxalign.data.forms import slots
from jaxalign.data.records import Record
from jaxalign.data.rows import Layout, Shape, empty_batch
from jaxalign.data.source import is_hub_id, parse_sources
from jaxalign.registry import ALGORITHMS
from jaxalign.types import Batch

NO_DATA = "DATA"  # in place of the sources, where no flag names any
_RECORD = 512  # tokens of a record in a packed row
_ROWS = 1 << 16  # of an epoch


def absent(config: Any, field: str = "data.sources") -> list[str]:
    """The sources of a stage that are not here: hub ids and urls; a file that is misspelt is refused when it is read.

    Args:
      config: of the stage.
      field: that names them.
    """
    paths = [os.path.expanduser(source.path) for source in parse_sources(get(config, field), field)]
    return [path for path in paths if is_url(path) or (is_hub_id(path) and not os.path.exists(path))]


class AssumedData:
    """What a stage asks of a dataset, of records that fill their rows.

    Args:
      config: of the stage, its `data.max_length` settled.
      readouts: share of a row's tokens that are read out, where the algorithm reads tokens.
    """

    def __init__(self, config: Any, readouts: float = 1.0):
        reads, data = ALGORITHMS[config.algorithm.name].reads, config.data
        sides = max(len(slots(reads)), 1)
        longest = max_length(config)
        self.reads, self.pad_id, self.batch_size = reads, 0, config.batch_size
        self._prompts = reads.readout == "none"
        if self._prompts:
            longest = min(longest - config.rollout.max_new_tokens, data.max_prompt_length or longest)
            length, completions, read = longest, 1, 0
        else:
            length = data.row_length or longest * sides
            completions = sides * (max(length // _RECORD, 1) if data.packing else 1)
            read = completions if reads.readout == "last" else max(int(length * readouts), 1)
        self._longest = min(longest * sides, length)  # tokens of a record
        self.layout = Layout(reads.readout, sides > 1 and bool(data.get("shared_prompt", True)))
        self.shape = Shape(config.batch_size, length, read, completions)
        self.widths: tuple[int, ...] = (length,)
        self.num_records = self.num_rows = _ROWS
        self.batches_per_epoch = -(-_ROWS // config.batch_size)
        self.records_digest = self.fingerprint = ""
        self.report: dict[str, Any] = {"records": {"used": _ROWS, "sources": []}, "warnings": []}

    def batch(self, index: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """Full causal rows, each record seeing itself alone."""
        del index, process_index
        shape = self.shape._replace(rows=self.batch_size // process_count)
        batch = empty_batch(shape, 1)
        column = np.broadcast_to(np.arange(shape.length, dtype=np.int32), batch.rows.tokens.shape)
        begin = column // self._longest * self._longest
        rows = batch.rows._replace(attend_start=begin, positions=column - begin)
        if not self._prompts:
            rows = rows._replace(causal=self.layout.causal)
        return batch._replace(rows=rows)

    def fill(self) -> float:
        """Share of tokens that are not padding."""
        return 1.0

    def is_whole(self, index: int) -> bool:
        """Whether batch `index` has no padding rows."""
        return True

    def lengths(self) -> dict[str, np.ndarray]:
        """Of a record: margins, which it is taken to have."""
        return {"score": np.ones(1, np.float32)}

    def record(self, i: int) -> Record:
        """A record of no columns: nothing is known of it."""
        return Record(i, "", i + 1, self.reads.forms[0])


def no_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Stands for a reward function, which runs on the host and is not imported for a plan."""
    del prompts, columns
    return [0.0] * len(completions)
