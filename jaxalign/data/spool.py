"""Records in a temporary file: sources are read once, records any number of times, without being held in memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, overload

import numpy as np

from jaxalign.data.cache import writable
from jaxalign.data.records import Record
from jaxalign.errors import InputError

_BLOCK = 64  # records that are written and read together
_IN_MEMORY = 8 << 20  # bytes that are held before a file is made


class Spool:
    """The records of one source, written once and then read by number.

    Up to 8 MiB stay in memory, more go to a temporary file.  It has no name, so the system removes it when the process
    ends, even if killed.

    Args:
      records: all of them.
      directory: where the file is made, or in the nearest folder above that exists; default: the system's own.

    Raises:
      InputError: the disk is full.
    """

    def __init__(self, records: Iterable[Record], directory: str | os.PathLike | None = None):
        self._directory = os.fspath(directory or tempfile.gettempdir())
        self._count = 0
        self._ends = array("q", [0])  # of blocks
        self._blocks: list[bytes] = []  # as long as there is no file
        self._file: IO[bytes] | None = None
        self._latest: tuple[int, list[tuple]] = -1, []  # the block that was read last
        stream = map(tuple, records)
        while block := list(islice(stream, _BLOCK)):
            self._count += len(block)
            self._write(_pickled(block))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Record:
        number, within = divmod(i, _BLOCK)
        latest = self._latest  # read once: another thread may set it
        if latest[0] != number:
            latest = self._latest = number, pickle.loads(self._read(number))
        return Record(*latest[1][within])

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]

    def _write(self, data: bytes) -> None:
        self._ends.append(self._ends[-1] + len(data))
        if self._file is None and self._ends[-1] <= _IN_MEMORY:
            self._blocks.append(data)
            return
        with writable(self._directory):
            if self._file is None:
                self._file = self._made()
                data, self._blocks = b"".join([*self._blocks, data]), []
            rest = memoryview(data)
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]

    def _made(self) -> IO[bytes]:
        """A file in the nearest existing folder: if the sources turn out to be bad, no folder is left behind."""
        folder = os.path.abspath(self._directory)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return tempfile.TemporaryFile(buffering=0, dir=folder)

    def _read(self, number: int) -> bytes:
        if self._file is None:
            return self._blocks[number]
        begin, end = self._ends[number : number + 2]
        return os.pread(self._file.fileno(), end - begin, begin)  # no shared offset: threads and forks may read


def _pickled(block: list[tuple]) -> bytes:
    try:
        return pickle.dumps(block, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a value's own `__reduce__` raises
        first, last = (f"{r.source}:{r.line}" for r in (Record(*block[0]), Record(*block[-1])))
        raise InputError(
            f"a value that cannot be stored, in the records {first} to {last} ({type(error).__name__}: {error})",
            "text, numbers, and lists and objects of them, nested at most some hundred deep",
            "leave that column out of the data",
        ) from error


class Records(Sequence[Record]):
    """The records of a mixture, as a sequence that reads from disk; `index` is a record's position.

    Args:
      spools: one of each source.
      sources: int [N], the source of each record.
      places: int [N], its place there.
    """

    def __init__(self, spools: Sequence[Spool], sources: np.ndarray, places: np.ndarray):
        self._spools, self._sources, self._places = spools, sources, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        at = range(len(self))[i]
        return self._at(at) if isinstance(at, int) else [self._at(k) for k in at]

    def __iter__(self) -> Iterator[Record]:
        return map(self._at, range(len(self)))

    def _at(self, i: int) -> Record:
        return self._spools[self._sources[i]][int(self._places[i])]._replace(index=i)
