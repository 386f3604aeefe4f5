"""Training records and held-out records, with no prompt in both."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from jaxalign.data.records import Record
from jaxalign.errors import InputError


def _key(value: object, seed: str = "") -> int:
    data = repr(value).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.encode()).digest(), "little")


def prompt_key(record: Record) -> int:
    """A hash of the prompt, or of the whole record if it has none: equal keys stay on one side of a split."""
    value: object = record.prompt or record.text
    if record.form == "messages":
        said = [m.get("role") for m in record.messages]
        value = record.messages[: said.index("assistant") if "assistant" in said else None] or record.messages
    value = value or record.completion or record.chosen
    if isinstance(value, list):
        value = [(m.get("role"), m.get("content")) for m in value]
    return _key(value)


class Groups:
    """Groups of records that share a prompt or an origin, directly or through others; 16 bytes a record."""

    def __init__(self) -> None:
        self._keys, self._origins = array("Q"), array("q")
        self._files: dict[str, int] = {}

    def add(self, record: Record) -> int:
        """Adds the next record and returns its prompt key."""
        source, line = record.origin
        self._keys.append(prompt_key(record))
        self._origins.append(self._files.setdefault(source, len(self._files)) << 40 | line)
        return self._keys[-1]

    def finish(self) -> np.ndarray:
        """uint64 [N]: a number for each record, equal within a group: the prompt key of the group's first record."""
        keys, origins = np.array(self._keys, np.uint64), np.array(self._origins, np.int64)
        labels = [np.unique(values, return_inverse=True)[1] for values in (keys, origins)]
        first = np.arange(len(keys))  # the first record of each one's group, as far as known
        while True:
            before = first
            for label in labels:
                least = np.full(len(keys), len(keys))
                np.minimum.at(least, label, first)
                first = least[label]
            first = first[first]
            if np.array_equal(first, before):
                return keys[first]


def held_out(groups: np.ndarray, fraction: float, seed: int, split: str) -> np.ndarray:
    """int32 [N]: the records of a split, in order.

    Whole groups are held out: those that a hash of the seed and their prompt ranks first, as many as keep within
    the share, and at least one.

    Args:
      groups: uint64, the group of each record.
      fraction: share that is held out; 0 gives all records to both splits.
      seed: of the run.
      split: "train" or "eval".

    Raises:
      InputError: where nothing is left to train on.
    """
    n = len(groups)
    if not fraction:
        return np.arange(n, dtype=np.int32)
    unique, members, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(np.fromiter((_key(int(g), str(seed)) for g in unique), np.uint64, len(unique)))
    taken = max(int(np.searchsorted(np.cumsum(counts[order]), fraction * n, side="right")), 1)
    is_held = np.zeros(len(unique), bool)
    is_held[order[:taken]] = True
    chosen = is_held[members]
    if chosen.all():
        raise InputError(
            f"data.eval_fraction {fraction:g} of {n} records with {len(unique)} different prompts",
            "records left to train on: no prompt is in both splits",
            "--config.data.eval_fraction=0, and data.eval_sources for evaluation",
        )
    return np.flatnonzero(chosen if split == "eval" else ~chosen).astype(np.int32)
