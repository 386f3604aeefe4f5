"""The token cache: examples tokenised once, kept in files that are mapped into memory.

    <cache_dir>/<key>/tokens.bin      int32, all examples behind each other: prompt, then completions
                      scored.bin      bool, as long as tokens
                      table.npy       a structured row per example, see TABLE
                      records.jsonl   the records, a line each; record_ends.npy says where lines end
                      meta.json       format, key, counts; written last

A cache is written in a directory of its own and renamed into place, so a half-written one is never seen; its
name is a digest of everything it depends on, so a stale one is never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.records import Record
from jaxalign.data.split import Groups, prompt_key
from jaxalign.data.tokenize import Example

FORMAT = 2
TABLE = np.dtype(
    [
        ("start", np.int64),  # of the prompt in tokens.bin
        ("prompt", np.int32),  # lengths
        ("completions", np.int32, (2,)),
        ("scored", np.int32, (2,)),  # scored tokens of each completion
        ("count", np.int8),  # of completions
        ("complete", np.bool_, (2,)),
        ("weight", np.float32),
        ("score", np.float32),
        ("digest", np.uint64),  # of the tokens
        ("prompt_key", np.uint64),  # of the prompt, as the record has it
        ("group", np.uint64),  # equal for examples that share a prompt or an origin
    ]
)


def digest(*parts: Any) -> str:
    """A hexadecimal digest of strings, bytes and JSON values."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def digest_records(records: Iterable[Record]) -> str:
    """A digest of all that records hold."""
    h = hashlib.blake2b(digest_size=16)
    for record in records:
        h.update(repr(tuple(record)).encode("utf-8", "surrogatepass"))
    return h.hexdigest()


def digest_tokenizer(tokenizer, prefix: list[int], eos_ids: Iterable[int]) -> str:
    """A digest of all that decides which tokens a text becomes."""
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    return digest(transformers.__version__, type(tokenizer).__name__, vocabulary, template, prefix, sorted(eos_ids))


class TokenStore:
    """Examples in a cache directory, read through memory maps."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text())
        self.table = np.load(self.directory / "table.npy", mmap_mode="r")
        self._tokens = _map(self.directory / "tokens.bin", np.int32)
        self._scored = _map(self.directory / "scored.bin", np.bool_)
        self._ends = np.load(self.directory / "record_ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.table)

    def example(self, i: int, number: int | None = None) -> Example:
        """Example i; it carries `number` as its record, or i."""
        row = self.table[i]
        start, count = int(row["start"]), int(row["count"])
        here = start + int(row["prompt"])
        completions, masks = [], []
        for length in row["completions"][:count].tolist():
            completions.append(self._tokens[here : here + length])
            masks.append(self._scored[here : here + length])
            here += length
        if not 0 <= start <= here <= len(self._tokens):
            raise ValueError(f"{self.directory} holds {len(self._tokens)} tokens, not those at {start} to {here}")
        return Example(
            i if number is None else number,
            self._tokens[start : start + int(row["prompt"])],
            tuple(completions),
            tuple(masks),
            tuple(row["complete"][:count].tolist()),
            float(row["weight"]),
            float(row["score"]),
        )

    def record(self, i: int) -> Record:
        """The record that example i was made from."""
        start = int(self._ends[i - 1]) if i else 0
        with open(self.directory / "records.jsonl", "rb") as f:
            f.seek(start)
            return Record(*json.loads(f.read(int(self._ends[i]) - start)))


def _map(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _write(directory: Path, pairs: Iterable[tuple[Record, Example]], meta: Callable[[], dict[str, Any]]) -> None:
    rows, ends, place, end = [], [], 0, 0
    groups = Groups()
    with (
        open(directory / "tokens.bin", "wb") as tokens,
        open(directory / "scored.bin", "wb") as scored,
        open(directory / "records.jsonl", "wb") as lines,
    ):
        for record, example in pairs:
            groups.add(record)
            count = len(example.completions)
            lengths = [len(c) for c in example.completions] + [0] * (2 - count)
            sums = [int(m.sum()) for m in example.masks] + [0] * (2 - count)
            done = (*example.complete, *[False] * (2 - count))
            data = [np.ascontiguousarray(part, np.int32).tobytes() for part in (example.prompt, *example.completions)]
            keys = (int(digest(*data)[:16], 16), prompt_key(record), 0)
            head = (place, len(example.prompt), lengths, sums, count, done, example.weight, example.score)
            rows.append((*head, *keys))
            for part in data:
                tokens.write(part)
            scored.write(bytes(len(example.prompt)))
            for mask in example.masks:
                scored.write(np.ascontiguousarray(mask, np.bool_).tobytes())
            place += len(example.prompt) + sum(lengths)
            line = (json.dumps(tuple(record), default=str) + "\n").encode()
            lines.write(line)
            end += len(line)
            ends.append(end)
    table = np.array(rows, TABLE)
    table["group"] = groups.finish()
    np.save(directory / "table.npy", table)
    np.save(directory / "record_ends.npy", np.array(ends, np.int64))
    (directory / "meta.json").write_text(json.dumps({"format": FORMAT, **meta()}))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One writer at a time on this machine, where the file system can lock; without it writers only waste work."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            lock = stack.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False
        yield alone


def open_or_write(
    cache_dir: str | Path, key: str, examples: Callable[[Counter], Iterable[tuple[Record, Example]]]
) -> TokenStore:
    """The store of a key, written if it is not there.

    Safe with several processes: each writes a directory of its own, the first to finish renames it into place,
    the others use that one.

    Args:
      cache_dir: holds one directory per key.
      key: a digest of everything the examples depend on.
      examples: makes them; counts what it leaves out in the Counter, which is kept as `meta["counts"]`.
    """
    root = Path(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    final = root / key
    with _locked(root / f"{key}.lock") as alone:
        if not _is_whole(final, key):
            for left_over in root.glob(f"{key}.*.tmp") if alone else ():
                shutil.rmtree(left_over, ignore_errors=True)  # of a writer that was killed
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=root))
            try:
                counts: Counter = Counter()
                _write(temporary, examples(counts), lambda: {"key": key, "counts": dict(counts)})
                if final.exists() and not _is_whole(final, key):
                    shutil.rmtree(final, ignore_errors=True)
                try:
                    os.rename(temporary, final)
                except OSError:
                    if not _is_whole(final, key):
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(final)


def _is_whole(directory: Path, key: str) -> bool:
    """Whether a directory holds all of the store of that key, in this format."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        if meta["format"] != FORMAT or meta["key"] != key:
            return False
        table = np.load(directory / "table.npy", mmap_mode="r")
        total = int(table["prompt"].sum(dtype=np.int64) + table["completions"].sum(dtype=np.int64))
        ends = np.load(directory / "record_ends.npy", mmap_mode="r")
        return (
            table.dtype == TABLE
            and (directory / "tokens.bin").stat().st_size == 4 * total
            and (directory / "scored.bin").stat().st_size == total
            and (directory / "records.jsonl").stat().st_size == (int(ends[-1]) if len(ends) else 0)
        )
    except (OSError, ValueError, KeyError):
        return False
