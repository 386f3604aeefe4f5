"""Reads rows of one data file: json, jsonl, csv (each also gzipped), parquet, arrow; on disk or at an fsspec URL.

A row is a plain dict with its file and line.  A file that cannot be read is an InputError.  A row that cannot be read
is a BadRow, which is passed to `on_bad`: it raises, or counts the row and reading continues.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

from jaxalign.data.records import BadRow
from jaxalign.errors import InputError

OnBad = Callable[[BadRow], None]


def stop(error: BadRow) -> None:
    """The default `on_bad`: raises at the first bad row."""
    raise error


class Raw(NamedTuple):
    """One row as read from a file, before its columns are mapped."""

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


def read_file(path: str, on_bad: OnBad = stop) -> Iterator[Raw]:
    """The rows of one file, in order.

    Args:
      path: a file whose name ends in one of `SUFFIXES`, or in one of them and `.gz` (text formats).
      on_bad: called with each bad row; reading continues where it does not raise.

    Raises:
      InputError: with the file, the line and what is wrong there.
    """
    if not is_url(path):
        _check_regular(path)
    reader = _reader(path)
    if reader is None:
        raise InputError(
            f"{path}: no known data format",
            f"a name that ends in {', '.join(SUFFIXES)}, text formats also with .gz",
            'write a JSON object a line, {"text": ...}, into a .jsonl file',
        )
    try:
        yield from reader(path, on_bad)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: broken gzip ({error})", "a whole gzip file", f"copy it again; gzip -t {path} checks it"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})",
            "UTF-8",
            f"iconv -f LATIN1 -t UTF-8 {path} > FILE",
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error}", "a file that can be read", f"ls -l {path}") from error


def _check_regular(path: str) -> None:
    """Refuses pipes, sockets and devices, which may block for ever, and links that lead nowhere."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            raise InputError(
                f"{path}: a symbolic link to {os.readlink(path)}, which cannot be followed ({error.strerror})",
                "a link to a file",
                f"ln -sfn /path/to/the/data {path}",
            ) from error
        return  # reported when it is opened
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    for test, kind in (*kinds, (stat.S_ISBLK, "a device")):
        if test(mode):
            raise InputError(f"{path}: {kind}", "a file, which can be read again", f"cat {path} > data.jsonl")


def _stream(path: str) -> IO[bytes]:
    """The bytes of a text file, decompressed."""
    raw = open_binary(path)
    if not path.lower().endswith(".gz"):
        return raw if hasattr(raw, "peek") else io.BufferedReader(raw)  # type: ignore[type-var]
    return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]


# Byte order marks, longer ones first: that of UTF-32-LE begins like that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _encoding(path: str, stream: IO[bytes]) -> str:
    """The encoding of a text file by its byte order mark; UTF-8 without one."""
    head = stream.peek(4)[:4]  # type: ignore[attr-defined]
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if b"\0" in head:
        order = "LE" if head[1:2] == b"\0" else "BE"
        raise InputError(
            f"{path}: zero bytes at its beginning, as UTF-16 without a mark has them",
            "UTF-8, or UTF-16 with a mark",
            f"iconv -f UTF-16{order} -t UTF-8 {path} > FILE",
        )
    return "utf-8-sig"


def _bad_line(path: str, line: int, problem: str, expected: str, reason: str) -> BadRow:
    fix = f"sed -n {line}p {path} shows the line; repair or delete it"
    return BadRow(f"{path}:{line}", problem, expected, fix, reason)


def _json(text: str) -> Any:
    """Parses JSON; every failure is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_jsonl(path: str, on_bad: OnBad) -> Iterator[Raw]:
    with _stream(path) as stream:
        yield from _json_lines(path, _lines(stream, _encoding(path, stream)), on_bad)


def _lines(stream: IO[bytes], encoding: str) -> IO[Any]:
    """The stream itself where it is UTF-8, else its text.  Lines end at \\n alone: U+2028 is legal in a JSON string."""
    return stream if encoding == "utf-8-sig" else io.TextIOWrapper(stream, encoding=encoding, newline="\n")


def _json_lines(path: str, lines: Iterable[bytes | str], on_bad: OnBad) -> Iterator[Raw]:
    """Parses lines; bytes are decoded line by line, so that invalid UTF-8 costs only its own line."""
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes):
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                fix = f"iconv -f LATIN1 -t UTF-8 {path} > FILE, or repair the line"
                on_bad(BadRow(f"{path}:{number}", problem, "UTF-8", fix, "not UTF-8"))
                continue
        if not line.strip():
            continue
        try:
            row = _json(line)
        except ValueError as error:
            if line.strip() == "[" and number == 1:
                raise _array(path) from error
            problem = _cut_off(line, error) or f"not JSON ({error}): {_shown(line)}"
            on_bad(_bad_line(path, number, problem, "one JSON object a line", "not JSON"))
            continue
        if isinstance(row, list) and number == 1 and row and isinstance(row[0], dict):
            raise _array(path)
        if not isinstance(row, dict):
            on_bad(_bad_line(path, number, f"{_kind(row)}: {_shown(line)}", "a JSON object", "no JSON object"))
            continue
        yield Raw(path, number, row)


def _cut_off(line: str, error: ValueError) -> str | None:
    """The problem of a truncated line; None where something else is wrong."""
    text = line.rstrip()
    if not isinstance(error, json.JSONDecodeError):
        return None
    ends = error.pos >= len(text)
    if error.msg.startswith("Unterminated string") or (ends and error.msg.startswith("Invalid control")):
        return f"the line ends inside a string: ...{text[-40:]}"  # the invalid control character is the newline
    return f"the line ends before its object does: ...{text[-40:]}" if ends else None


def _array(path: str) -> InputError:
    name = path.removesuffix(".gz")
    renamed = name[: name.rindex(".")] + ".json" + path[len(name) :]
    return InputError(
        f"{path}: an array of objects", "one JSON object a line, or an array in a .json file", f"mv {path} {renamed}"
    )


def _read_json(path: str, on_bad: OnBad) -> Iterator[Raw]:
    """An array of objects, an object of equally long columns, an object around one array, or JSON lines."""
    with _stream(path) as stream:
        encoding = _encoding(path, stream)
        lines = _lines(stream, encoding)
        begin: list[Any] = []  # up to the second line that is not blank
        full = 0
        for line in lines:
            begin.append(line)
            full += not _is_blank(line)
            if full == 2:
                break
        is_lines = _is_object(next((line for line in begin if not _is_blank(line)), ""))
        if full == 2 and is_lines:  # JSON lines, as many .json files
            yield from _json_lines(path, chain(begin, lines), on_bad)
            return
        begin.append(lines.read())
    text = "".join(begin) if encoding != "utf-8-sig" else b"".join(begin).decode(encoding)
    try:
        whole = _json(text)
    except ValueError as error:
        if not text.strip():
            return
        if is_lines:  # one, beside blank lines that JSON does not know as blank
            yield from _json_lines(path, begin[:-1], on_bad)
            return
        line = getattr(error, "lineno", 1)
        problem = f"not JSON ({error})"
        raise _bad_line(path, line, problem, "an array of objects, or JSON lines", "not JSON") from error
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
            fix = f"repair it in {path}"
            on_bad(BadRow(f"{path}:{number}", f"record {number} is {_kind(row)}", "an object", fix, "no JSON object"))
            continue
        yield Raw(path, number, row)


def _is_blank(line: bytes | str) -> bool:
    return not (line.decode("utf-8-sig", "replace") if isinstance(line, bytes) else line).strip()


def _is_object(line: bytes | str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(_json(line.decode("utf-8-sig") if isinstance(line, bytes) else line), dict)
    except ValueError:  # a UnicodeDecodeError is one too
        return False


def _rows_of(whole: Any) -> list | None:
    """The records in a parsed JSON file; None if it has no such structure."""
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


def _read_csv(path: str, on_bad: OnBad, delimiter: str | None = None) -> Iterator[Raw]:
    """Rows under a header line; a cell that holds a JSON list of messages is parsed.

    Without a delimiter it is the comma, or, where the header has none, the semicolon, the tab or the | that it has.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    with _stream(path) as stream:
        text = io.TextIOWrapper(stream, encoding=_encoding(path, stream), newline="")
        head, lines = _first_line(text)
        if delimiter is None:
            delimiter = "," if "," in head else next((d for d in ";\t|" if d in head), ",")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
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
                        shown = ", ".join(map(repr, sorted(repeated)))
                        raise _bad_line(path, line, f"repeated column {shown}", "different names", "")
                    continue
                if len(cells) != len(header):
                    wanted = f"{len(header)}, as in the header ({_names(header)})"
                    on_bad(_bad_line(path, line, f"{len(cells)} cells", wanted, "another number of cells"))
                    continue
                yield Raw(path, line, dict(zip(header, map(_cell, cells), strict=True)))
        except csv.Error as error:
            wanted = "cells, quoted where they hold delimiters or quotes (doubled)"
            raise _bad_line(path, start, f"not CSV ({error})", wanted, "") from error


def _first_line(text: io.TextIOWrapper) -> tuple[str, Iterator[str]]:
    """The first line that is not blank, and all lines."""
    begin = []
    for line in text:
        begin.append(line)
        if line.strip():
            break
    return (begin[-1] if begin else ""), chain(begin, text)


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


def _read_parquet(path: str, on_bad: OnBad) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
            yield from _arrow_rows(path, batches)
        except pyarrow.ArrowException as error:
            raise _broken(path, "parquet", error) from error


def _read_arrow(path: str, on_bad: OnBad) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.ipc

    with open_binary(path) as file:
        try:
            if file.read(6) == b"ARROW1":  # IPC file format; `datasets` writes the stream format
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
        batch.validate(full=True)  # offsets of a damaged file point outside of it: a segmentation fault
        for start in range(0, batch.num_rows, 1024):
            for row in batch.slice(start, 1024).to_pylist():
                number += 1
                yield Raw(path, number, row)


def _broken(path: str, name: str, error: Exception) -> InputError:
    return InputError(f"{path}: broken {name} ({str(error).splitlines()[0]})", f"a whole {name} file", "copy it again")


def _kind(value: Any) -> str:
    """The type of a JSON value, for messages.

    >>> _kind([1]), _kind(None), _kind("x")
    ('an array', 'null', 'a string')
    """
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")


def _names(names) -> str:
    """Up to twelve names, for messages."""
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _shown(text: str) -> str:
    """The start of a line, for messages."""
    text = text.strip()
    return text if len(text) <= 60 else text[:60] + "..."


_READERS: tuple[tuple[str, Callable[[str, OnBad], Iterator[Raw]]], ...] = (
    (".jsonl", _read_jsonl),
    (".ndjson", _read_jsonl),
    (".json", _read_json),
    (".csv", _read_csv),
    (".tsv", lambda path, on_bad: _read_csv(path, on_bad, "\t")),
    (".parquet", _read_parquet),
    (".arrow", _read_arrow),
)
SUFFIXES = tuple(suffix for suffix, _ in _READERS)


def _reader(path: str) -> Callable[[str, OnBad], Iterator[Raw]] | None:
    name = path.lower()
    gzipped = name.endswith(".gz")
    name = name.removesuffix(".gz")
    for suffix, reader in _READERS:
        if name.endswith(suffix) and not (gzipped and suffix in (".parquet", ".arrow")):
            return reader
    return None
