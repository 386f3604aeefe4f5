"""The token cache: examples are tokenised once and read through memory maps.

    <cache_dir>/<key>/tokens.bin      int32, all examples concatenated: prompt, then completions
                      scored.bin      bool, as long as tokens
                      table.npy       a structured row per example, see TABLE
                      records.jsonl   the records, one a line; record_ends.npy has the offset of each line's end
                      meta.json       format, key, counts, a checksum of each file; written last

A cache is written to a temporary directory and renamed into place, so it is never seen half-written.  Its name is a
digest of everything that it depends on, so a stale one is never used.  Checksums are compared when it is opened: a
damaged cache is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.records import Notes, Record
from jaxalign.data.split import Groups
from jaxalign.data.tokenize import Example
from jaxalign.disk import writing
from jaxalign.errors import InputError

FORMAT = 4
_FILES = ("tokens.bin", "scored.bin", "records.jsonl", "table.npy", "record_ends.npy")
_ROWS = 256  # rows of the table that are converted at once
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


def digest_records(records: Iterable[Record]) -> tuple[str, str]:
    """Digests of the records' contents and of their source paths."""
    content, sources = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for record in records:
        index, source, *rest = record
        content.update(repr((index, rest)).encode("utf-8", "surrogatepass"))
        sources.update(source.encode("utf-8", "surrogatepass") + b"\0")
    return content.hexdigest(), sources.hexdigest()


def digest_tokenizer(tokenizer, prefix: list[int], eos_ids: Iterable[int]) -> str:
    """A digest of everything that tokenisation depends on."""
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    return digest(transformers.__version__, type(tokenizer).__name__, vocabulary, template, prefix, sorted(eos_ids))


class TokenStore:
    """Examples in a cache directory, read through memory maps.

    Args:
      directory: of a whole cache.
      damage: what was wrong with the cache that this one replaces; "" where there was none.
    """

    def __init__(self, directory: str | Path, damage: str = ""):
        self.directory, self.damage = Path(directory), damage
        self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text())
        self.table = np.load(self.directory / "table.npy", mmap_mode="r")
        self._tokens = _map(self.directory / "tokens.bin", np.int32)
        self._scored = _map(self.directory / "scored.bin", np.bool_)
        self._ends = np.load(self.directory / "record_ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.table)

    def example(self, i: int, number: int | None = None) -> Example:
        """Example i; its `record` is `number`, default i."""
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

    def sample(self, count: int = 64) -> list[Record]:
        """The first records."""
        return [self.record(i) for i in range(min(count, len(self)))]


def _map(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _write(directory: Path, pairs: Iterable[tuple[Record, Example]], meta: Callable[[], dict[str, Any]]) -> None:
    rows, table_bytes, ends, place, end = [], bytearray(), array("q"), 0, 0
    groups = Groups()
    with (
        open(directory / "tokens.bin", "wb") as tokens,
        open(directory / "scored.bin", "wb") as scored,
        open(directory / "records.jsonl", "wb") as lines,
    ):
        for record, example in pairs:
            count = len(example.completions)
            lengths = [len(c) for c in example.completions] + [0] * (2 - count)
            sums = [int(m.sum()) for m in example.masks] + [0] * (2 - count)
            done = (*example.complete, *[False] * (2 - count))
            data = [np.ascontiguousarray(part, np.int32).tobytes() for part in (example.prompt, *example.completions)]
            keys = (int(digest(*data)[:16], 16), groups.add(record), 0)
            head = (place, len(example.prompt), lengths, sums, count, done, example.weight, example.score)
            rows.append((*head, *keys))
            if len(rows) == _ROWS:
                table_bytes += np.array(rows, TABLE).tobytes()
                rows.clear()
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
    table_bytes += np.array(rows, TABLE).tobytes()
    table = np.frombuffer(table_bytes, TABLE)
    table["group"] = groups.finish()
    np.save(directory / "table.npy", table)
    np.save(directory / "record_ends.npy", np.array(ends, np.int64))
    checksums = {name: _checksum(directory / name) for name in _FILES}
    whole = json.loads(json.dumps({"format": FORMAT, **meta(), "sums": checksums}))
    (directory / "meta.json").write_text(json.dumps({**whole, "sum": _sum_of(whole)}))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a file lock: one writer at a time.  Without locks several processes write the same cache; still correct."""
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
    cache_dir: str | Path, key: str, examples: Callable[[Notes], Iterable[tuple[Record, Example]]]
) -> TokenStore:
    """Opens the store of a key; writes it first if it is missing or damaged.

    Safe with several processes: each writes its own directory, the first to finish renames it into place, and the
    others use that one.  Checksums are compared before use, which reads the whole cache once: 0.07 s for 200 MB in the
    page cache (2.8 GB/s), else the time of the disk.

    Args:
      cache_dir: holds one directory per key.
      key: a digest of everything the examples depend on.
      examples: yields them; what it counts in the notes is kept as `meta["counts"]` and `["places"]`.

    Raises:
      InputError: where nothing can be written to `cache_dir`.
    """
    root = Path(cache_dir)
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        return _open_or_write(root, key, examples)


@contextlib.contextmanager
def writable(root: str | os.PathLike) -> Iterator[None]:
    """Turns every failure to write below the cache's directory into an InputError that names the directory."""
    try:
        with writing(root):
            yield
    except OSError as error:
        raise InputError(
            f"{os.fspath(root)}: the cache of tokens cannot be written ({error.strerror or error})",
            "a directory on this machine with room for it: about 5 bytes for a token, and the records twice",
            "--config.data.cache_dir=DIR",
        ) from error


def _open_or_write(root: Path, key: str, examples: Callable[[Notes], Iterable[tuple[Record, Example]]]) -> TokenStore:
    final = root / key
    with _locked(root / f"{key}.lock") as alone:
        damage = _damage(final, key)
        if damage is not None:
            for left_over in root.glob(f"{key}.*.tmp") if alone else ():
                shutil.rmtree(left_over, ignore_errors=True)  # of a writer that was killed
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=root))
            try:
                notes = Notes()
                meta = lambda: {"key": key, "counts": dict(notes), "places": notes.places}  # noqa: E731
                _write(temporary, examples(notes), meta)
                if final.exists() and _damage(final, key) is not None:
                    shutil.rmtree(final, ignore_errors=True)
                try:
                    os.rename(temporary, final)
                except OSError:
                    if _damage(final, key) is not None:
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(final, damage or "")


def _damage(directory: Path, key: str) -> str | None:
    """What is wrong with the store of a key: None if nothing, "" if there is none yet."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        found, said = meta["format"], meta.pop("sum")
    except FileNotFoundError:
        return "meta.json is missing" if directory.exists() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "meta.json"
    if found != FORMAT or meta.get("key") != key:
        return ""  # of another version
    if said != _sum_of(meta):
        return "meta.json"
    try:
        wrong = [name for name, sum in meta["sums"].items() if _checksum(directory / name) != sum]
    except OSError as error:
        return str(error)
    return ", ".join(wrong) if wrong else None


def _checksum(path: Path) -> int:
    """CRC-32 of a file: detects flipped bits and truncation, and is the fastest checksum in Python."""
    sum = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 16):
            sum = zlib.crc32(part, sum)
    return sum


def _sum_of(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
