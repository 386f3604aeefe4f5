"""Reference log-probs computed ahead: one pass over the data, kept on disk, attached to batches.

A reference that is read from a cache costs no memory while the policy trains, and no forward pass.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import jax
import numpy as np

from jaxalign.data.cache import digest, digest_tokenizer
from jaxalign.disk import write_whole
from jaxalign.errors import InputError
from jaxalign.models.identity import describe, fingerprint
from jaxalign.parallel.processes import is_main, say
from jaxalign.parallel.sharding import batch_part, put_batch
from jaxalign.rollout.host import all_rows
from jaxalign.steps.preference import sequence_logprobs
from jaxalign.train.compiled import Compiled
from jaxalign.train.minibatches import in_parts
from jaxalign.train.stage import Stage
from jaxalign.types import Batch, Params

_SAVE_SECONDS = 60.0  # between two writes of an unfinished cache


class WithReference:
    """A dataset whose batches carry the reference's log-probs."""

    def __init__(self, dataset: Any, table: np.ndarray):
        """
        Args:
          dataset: of pairs.
          table: float32 [num_records, 2], nats, by record and role.
        """
        self._dataset, self._table = dataset, table
        self.batches_per_epoch, self.shape, self.is_whole = dataset.batches_per_epoch, dataset.shape, dataset.is_whole

    def batch(self, index: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """As the dataset's, with `completions.ref_logprob` filled."""
        batch = self._dataset.batch(index, process_index, process_count)
        there = batch.completions.mask & (batch.record_ids >= 0)
        found = self._table[np.where(there, batch.record_ids, 0), np.where(there, batch.completions.role, 0)]
        ref = np.where(there, found, 0).astype(np.float32)
        return batch._replace(completions=batch.completions._replace(ref_logprob=ref))


def attach(stage: Stage, datasets: list[Any]) -> list[Any]:
    """Wraps the stage's datasets; computes what no cache has, with the reference in memory only meanwhile.

    Args:
      stage: whose program has a `reference`.
      datasets: training and evaluation data; None stays None.
    """
    role = stage.program.reference
    params = role.load()
    model_key = fingerprint(params)
    tokenizer_key = digest_tokenizer(stage.tokenizer, [], stage.stop_ids)
    folder = stage.directory.cache
    if stage.config.data.cache_dir:
        from etils import epath

        folder = epath.Path(stage.config.data.cache_dir)
    logprobs = reference_pass(role.model, stage.config.grad_accum_steps)
    wrapped = []
    for dataset in datasets:
        if dataset is None:
            wrapped.append(None)
            continue
        keys = {
            "model": model_key,
            "config": describe(role.model.config),  # its dtype among them
            "data": dataset.fingerprint,
            "tokenizer": tokenizer_key,
        }
        cache = ReferenceCache(folder, keys, dataset.num_records)
        table = cache.read()
        if not np.isfinite(table).all():
            table = _compute(dataset, table, cache, lambda batch: logprobs(params, batch), stage.mesh)
        wrapped.append(WithReference(dataset, table))
    return wrapped


def reference_pass(model: Any, parts: int) -> Compiled:
    """(params, batch) -> the log-prob of each completion of the batch, whose rows go through the model in parts."""

    def logprobs(params: Params, batch: Batch) -> jax.Array:
        return in_parts(lambda rows: sequence_logprobs(model.apply, model.head, params, rows), batch, parts)

    return Compiled(logprobs, "reference pass")


def _compute(dataset: Any, table: np.ndarray, cache: ReferenceCache, logprobs: Any, mesh: Any) -> np.ndarray:
    """Fills the table from the batches of one epoch; rows that are there already are not computed again."""
    written = time.monotonic()
    for index in range(dataset.batches_per_epoch):
        ids = np.concatenate([np.asarray(row) for row in dataset.members(index)])
        if not np.isnan(table[ids]).any():
            continue
        batch = put_batch(dataset.batch(index, *batch_part(mesh)), mesh)
        values = all_rows(logprobs(batch))
        mask, ids, role = (all_rows(x) for x in (batch.completions.mask, batch.record_ids, batch.completions.role))
        table[ids[mask], role[mask]] = values[mask]
        if time.monotonic() - written > _SAVE_SECONDS:
            cache.write(table)
            written = time.monotonic()
    if not np.isfinite(table).all():
        missing = np.flatnonzero(~np.isfinite(table).all(axis=1))[:8].tolist()
        raise InputError(
            f"reference log-probs of records {missing} are not finite",
            "a reference that gives every completion a finite log-prob",
            "--config.model.dtype=float32, or look at those records",
        )
    cache.write(table)
    return table


class ReferenceCache:
    """A file of reference log-probs, named by and holding the fingerprints of weights, config, data and tokenizer."""

    def __init__(self, folder: Any, keys: dict[str, str], num_records: int):
        """
        Args:
          folder: an `epath.Path`.
          keys: fingerprints by name.
          num_records: rows of the table.
        """
        self.keys, self._num_records = keys, num_records
        self.path = folder / f"reference-{digest(keys)}.npz"

    def read(self) -> np.ndarray:
        """The table, float32 [num_records, 2], nan where nothing was computed yet; the same on every process.

        A file that is damaged, or of other keys than its name says, is ignored with a warning.
        """
        table = np.full((self._num_records, 2), np.nan, np.float32)
        if is_main() and self.path.exists():
            found = _parse(self.path.read_bytes(), self.keys)
            if found is not None and found.shape == table.shape:
                table = found
            else:
                say(f"warning: {self.path} is damaged or of other inputs: its log-probs are computed again")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            table = np.array(multihost_utils.broadcast_one_to_all(table))
        return table

    def write(self, table: np.ndarray) -> None:
        """Writes the file whole: a reader sees the old one or the new one."""
        if not is_main():
            return
        data = io.BytesIO()
        np.savez(data, keys=json.dumps(self.keys), table=table, checksum=digest(self.keys, table.tobytes()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, data.getvalue())  # other runs may share the folder


def _parse(data: bytes, keys: dict[str, str]) -> np.ndarray | None:
    """The table of a file's bytes; None where they are damaged or were made with other keys."""
    try:
        with np.load(io.BytesIO(data)) as file:
            table = file["table"]
            whole = str(file["checksum"]) == digest(keys, table.tobytes()) and table.dtype == np.float32
            return table if whole and json.loads(str(file["keys"])) == keys else None
    except Exception:  # of zipfile, numpy and json: which one depends on the byte that is wrong
        return None
