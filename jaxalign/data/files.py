"""Rows of one data file: json, jsonl, csv (each also gzipped), parquet, arrow; on disk or at a URL fsspec knows.

A row comes as a plain dict with the place it stands at.  What cannot be read is an InputError that names the place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from jaxalign.errors import InputError


class Raw(NamedTuple):
    """One row as the data has it."""

    file: str  # path, or hub id and split
    line: int  # line of a text file, else number of the record, from 1
    row: dict[str, Any]

    @property
    def where(self) -> str:
        """The row's place, as error messages name it."""
        return f"{self.file}:{self.line}"


def is_url(path: str) -> bool:
    """Whether a path belongs to fsspec: `gs://...`, `s3://...`, `hf://...`, `memory://...`."""
    return "://" in path


def open_binary(path: str) -> IO[bytes]:
    """Opens a file of the disk or of an object store."""
    if is_url(path):
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb")


def supported(path: str) -> bool:
    """Whether the name ends as a format that `read_file` knows.

    >>> supported("a/train.jsonl.gz"), supported("a/README.md")
    (True, False)
    """
    return _reader(path) is not None


def read_file(path: str) -> Iterator[Raw]:
    """The rows of one file, in order.

    Args:
      path: a file whose name ends in one of `SUFFIXES`, or in one of them and `.gz` (text formats).

    Raises:
      InputError: with the file, the line and what is wrong there.
    """
    reader = _reader(path)
    if reader is None:
        raise InputError(
            f"{path}: no known data format",
            f"a name that ends in {', '.join(SUFFIXES)}, text formats also with .gz",
            'write a JSON object a line, {"text": ...}, into a .jsonl file',
        )
    try:
        yield from reader(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: broken gzip ({error})", "a whole gzip file", f"copy it again; gzip -t {path} checks it"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})",
            "UTF-8",
            f"iconv -f LATIN1 -t UTF-8 {path}",
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error}", "a file that can be read", f"ls -l {path}") from error


def _stream(path: str) -> IO[bytes]:
    """The bytes of a text file, decompressed."""
    raw = open_binary(path)
    return gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw  # type: ignore[return-value]


def _bad_line(path: str, line: int, problem: str, expected: str) -> InputError:
    return InputError(
        f"{path}:{line}: {problem}", expected, f"sed -n {line}p {path} shows the line; repair or delete it"
    )


def _json(text: str) -> Any:
    """Parses JSON; every way in which text can fail to be JSON is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_jsonl(path: str) -> Iterator[Raw]:
    with _stream(path) as stream:
        # Lines end at \n alone: U+2028 and its kin are legal inside a JSON string.
        yield from _json_lines(path, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"))


def _json_lines(path: str, lines) -> Iterator[Raw]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _json(line)
        except ValueError as error:
            if line.strip() == "[" and number == 1:
                raise _array(path) from error
            problem = _cut_off(line, error) or f"not JSON ({error}): {_shown(line)}"
            raise _bad_line(path, number, problem, "one JSON object a line") from error
        if isinstance(row, list) and number == 1 and row and isinstance(row[0], dict):
            raise _array(path)
        if not isinstance(row, dict):
            raise _bad_line(path, number, f"{_kind(row)}: {_shown(line)}", "a JSON object")
        yield Raw(path, number, row)


def _cut_off(line: str, error: ValueError) -> str | None:
    """What to say of a line that ends too early; None where something else is wrong with it."""
    text = line.rstrip()
    if not isinstance(error, json.JSONDecodeError):
        return None
    ends = error.pos >= len(text)
    if error.msg.startswith("Unterminated string") or (ends and error.msg.startswith("Invalid control")):
        return f"the line ends inside a string: ...{text[-40:]}"  # the newline is the control character
    return f"the line ends before its object does: ...{text[-40:]}" if ends else None


def _array(path: str) -> InputError:
    name = path.removesuffix(".gz")
    renamed = name[: name.rindex(".")] + ".json" + path[len(name) :]
    return InputError(
        f"{path}: an array of objects", "one JSON object a line, or an array in a .json file", f"mv {path} {renamed}"
    )


def _read_json(path: str) -> Iterator[Raw]:
    """An array of objects, an object of equally long columns, an object around one array, or JSON lines."""
    with _stream(path) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        whole = _json(text)
    except ValueError as error:
        # Many .json files hold JSON lines; then the first line is whole by itself.
        lines = text.split("\n")
        first = next((line for line in lines if line.strip()), "")
        try:
            is_lines = isinstance(_json(first), dict)
        except ValueError:
            is_lines = False
        if is_lines:
            yield from _json_lines(path, lines)
            return
        if not text.strip():
            return
        line = getattr(error, "lineno", 1)
        raise _bad_line(path, line, f"not JSON ({error})", "an array of objects, or JSON lines") from error
    rows = _rows_of(whole)
    if rows is None:
        raise InputError(
            f"{path}: {_kind(whole)} that holds no records"
            + (f", keys {_names(whole)}" if isinstance(whole, dict) else ""),
            "an array of objects",
            'wrap them: [{"prompt": ..., "chosen": ..., "rejected": ...}, ...]',
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: record {number} is {_kind(row)}", "an object", f"repair it in {path}")
        yield Raw(path, number, row)


def _rows_of(whole: Any) -> list | None:
    """The records in a parsed JSON file, None where there are none to be seen."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or not whole:
        return None
    values = list(whole.values())
    nested = [v for v in values if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(nested) == 1 and sum(isinstance(v, list) for v in values) == 1:
        return nested[0]
    if all(isinstance(v, list) for v in values) and len({len(v) for v in values}) == 1:
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    return None


def _read_csv(path: str, delimiter: str = ",") -> Iterator[Raw]:
    """Rows under a header line; a cell that holds a JSON list of messages is parsed."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    with _stream(path) as stream:
        reader = csv.reader(
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        header: list[str] | None = None
        start = 1
        try:
            for cells in reader:
                line, start = start, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = cells
                    repeated = {name for name in header if header.count(name) > 1}
                    if repeated:
                        raise _bad_line(path, line, f"repeated column {', '.join(sorted(repeated))}", "different names")
                    continue
                if len(cells) != len(header):
                    raise _bad_line(
                        path, line, f"{len(cells)} cells", f"{len(header)}, as in the header ({_names(header)})"
                    )
                yield Raw(path, line, dict(zip(header, map(_cell, cells), strict=True)))
        except csv.Error as error:
            raise _bad_line(path, start, f"not CSV ({error})", "cells, quoted where they hold commas") from error


def _cell(text: str) -> Any:
    """A cell; a JSON list of messages is parsed, any other JSON is a text."""
    if text.startswith("[{"):
        try:
            items = _json(text)
        except ValueError:
            return text
        if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
            return items
    return text


def _read_parquet(path: str) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
            yield from _arrow_rows(path, batches)
        except pyarrow.ArrowException as error:
            raise _broken(path, "parquet", error) from error


def _read_arrow(path: str) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.ipc

    with open_binary(path) as file:
        try:
            if file.read(6) == b"ARROW1":  # the file format; `datasets` writes the stream format
                reader = pyarrow.ipc.open_file(file)
                yield from _arrow_rows(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
            else:
                file.seek(0)
                yield from _arrow_rows(path, pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowException as error:
            raise _broken(path, "arrow", error) from error


def _arrow_rows(path: str, batches) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Raw(path, number, row)


def _broken(path: str, name: str, error: Exception) -> InputError:
    return InputError(f"{path}: broken {name} ({str(error).splitlines()[0]})", f"a whole {name} file", "copy it again")


def _kind(value: Any) -> str:
    """What a JSON value is, in words.

    >>> _kind([1]), _kind(None), _kind("x")
    ('an array', 'null', 'a string')
    """
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")


def _names(names) -> str:
    """The first names of many."""
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _shown(text: str) -> str:
    """The start of a line."""
    text = text.strip()
    return text if len(text) <= 60 else text[:60] + "..."


_READERS: tuple[tuple[str, Callable[[str], Iterator[Raw]]], ...] = (
    (".jsonl", _read_jsonl),
    (".ndjson", _read_jsonl),
    (".json", _read_json),
    (".csv", _read_csv),
    (".tsv", lambda path: _read_csv(path, "\t")),
    (".parquet", _read_parquet),
    (".arrow", _read_arrow),
)
SUFFIXES = tuple(suffix for suffix, _ in _READERS)


def _reader(path: str) -> Callable[[str], Iterator[Raw]] | None:
    name = path.lower()
    gzipped = name.endswith(".gz")
    name = name.removesuffix(".gz")
    for suffix, reader in _READERS:
        if name.endswith(suffix) and not (gzipped and suffix in (".parquet", ".arrow")):
            return reader
    return None
