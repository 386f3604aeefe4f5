"""Every file format reads the same rows, and what is broken is named with its place."""

import contextlib
import csv
import gzip
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.files import read_file, supported
from jaxalign.errors import InputError

ROWS = [
    {"prompt": "Why?", "chosen": 'Because, "so".\nYes', "rejected": "No"},
    {"prompt": "日本 🙂 \u2028 end", "chosen": "é", "rejected": "\x00 nul"},
]


def rows(path):
    return [raw.row for raw in read_file(str(path))]


def lines(items, newline="\n"):
    return "".join(json.dumps(item, ensure_ascii=False) + newline for item in items).encode()


def as_csv(items, delimiter=","):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, items[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(items)
    return out.getvalue().encode()


def as_arrow(items, new):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(items)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def as_parquet(items):
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue()


FORMATS = {
    "a.jsonl": lines(ROWS),
    "crlf.jsonl": lines(ROWS, "\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
    "blank.jsonl": b"\n" + lines(ROWS) + b"\n  \n\n",
    "no_last_newline.jsonl": lines(ROWS)[:-1],
    "a.ndjson": lines(ROWS),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "A.JSONL.GZ": gzip.compress(lines(ROWS)),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "around.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "lines.json": lines(ROWS),
    "a.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "a.csv.gz": gzip.compress(as_csv(ROWS)),
    "a.tsv": as_csv(ROWS, "\t"),
    "semicolon.csv": as_csv(ROWS, ";"),
    "pipe.csv": as_csv(ROWS, "|"),
    "tab.csv": b"\xef\xbb\xbf" + as_csv(ROWS, "\t"),
    "excel.csv": as_csv(ROWS, "\t").decode().encode("utf-16"),  # what Excel calls Unicode text
    "utf16.jsonl": lines(ROWS).decode().encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(lines(ROWS).decode().encode("utf-16")),
    "utf32.json": json.dumps(ROWS).encode("utf-32"),
    "a.parquet": as_parquet(ROWS),
    "file.arrow": as_arrow(ROWS, pa.ipc.new_file),
    "stream.arrow": as_arrow(ROWS, pa.ipc.new_stream),
}


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_texts_that_an_arrow_file_has_elsewhere_do_not_end_the_process(tmp_path, writer):
    sink = io.BytesIO()
    with writer(sink, pa.schema([("text", pa.string())])) as file:
        file.write_table(pa.table({"text": ["a" * 111, "b" * 111]}))
    whole = sink.getvalue()
    ends = np.array([[0, 111, 222], [0, 111, 1 << 30]], np.int32)  # far behind the file
    assert whole.count(ends[0].tobytes()) == 1
    (tmp_path / "x.arrow").write_bytes(whole.replace(ends[0].tobytes(), ends[1].tobytes()))
    with pytest.raises(InputError, match="broken arrow"):
        rows(tmp_path / "x.arrow")


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert rows(tmp_path / name) == ROWS


def test_places_are_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [raw.line for raw in read_file(str(tmp_path / "a.jsonl"))] == [2, 4]
    (tmp_path / "a.csv").write_bytes(b'text\n"two\nlines"\nlast\n')
    assert [raw.line for raw in read_file(str(tmp_path / "a.csv"))] == [2, 4]


@pytest.mark.parametrize("blank", ["\u00a0", "\x0c", "\x1c"])
def test_a_json_line_beside_a_blank_one_is_read(tmp_path, blank):
    path = tmp_path / "a.json"
    for text in (f'{blank}\n{{"text": "a"}}\n', f'{{"text": "a"}}\n{blank}\n', f'\ufeff\n{{"text": "a"}}\n{blank}'):
        path.write_text(text, encoding="utf-8")
        assert rows(path) == [{"text": "a"}]


def test_lines_end_at_newlines_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":\r "a"}\n{"text": "b\xe2\x80\xa8c\xc2\x85"}\r\n')
    assert [row["text"] for row in rows(tmp_path / "a.jsonl")] == ["a", "b\u2028c\x85"]


def test_csv_takes_messages_and_huge_cells(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    (tmp_path / "a.csv").write_bytes(
        as_csv([{"messages": json.dumps(messages), "text": "[{not json", "code": '[{"a": 1}]', "t": "x" * 300_000}])
    )
    (row,) = rows(tmp_path / "a.csv")
    assert row["messages"] == messages and row["text"] == "[{not json" and len(row["t"]) == 300_000
    assert row["code"] == '[{"a": 1}]', "JSON that is no list of messages is a text"


BROKEN = {
    "cut.jsonl": (lines(ROWS)[:-9], "cut.jsonl:2: not JSON"),
    "scalar.jsonl": (b'{"text": "a"}\n3\n', "scalar.jsonl:2: a number: 3"),
    "null.jsonl": (b"null\n", "null.jsonl:1: null"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not JSON (nested too deeply)"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "digits.jsonl:1: not JSON"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
    "latin.json": ('[{"text": "é"}]'.encode("latin-1"), "latin.json: not UTF-8"),
    "unmarked.jsonl": ('{"text": "a"}\n'.encode("utf-16-le"), "unmarked.jsonl: zero bytes at its beginning, as UTF-16"),
    "unmarked.csv": ("text\na\n".encode("utf-16-be"), "unmarked.csv: zero bytes at its beginning, as UTF-16"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS * 500))[:-20], "cut.jsonl.gz: broken gzip"),
    "plain.jsonl.gz": (lines(ROWS), "plain.jsonl.gz: broken gzip"),
    "crc.jsonl.gz": (gzip.compress(lines(ROWS))[:-8] + b"12345678", "crc.jsonl.gz: broken gzip"),
    "cut.json": (json.dumps(ROWS).encode()[:-4], "cut.json:1: not JSON"),
    "strings.json": (b'["a"]', "strings.json:1: record 1 is a string"),
    "string.json": (b'"a"', "string.json: a string that holds no records"),
    "one.json": (b'{"prompt": "a", "n": 3}', "one.json: an object that holds no records, keys prompt, n"),
    "cells.csv": (b"a,b\n1,2\n1,2,3\n", "cells.csv:3: 3 cells"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: repeated column 'a'"),
    "quote.csv": (b'a\n"x\n', "quote.csv:2: not CSV"),
    "bad.parquet": (b"PAR1 no parquet", "bad.parquet: broken parquet"),
    "bad.arrow": (b"ARROW1 no arrow", "bad.arrow: broken arrow"),
    "empty.parquet": (b"", "empty.parquet: broken parquet"),
    "a.txt": (b"text", "a.txt: no known data format"),
    "a.parquet.gz": (b"", "a.parquet.gz: no known data format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_their_place(tmp_path, name):
    content, found = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        rows(tmp_path / name)
    assert f"{tmp_path}/{found}" in error.value.found
    assert error.value.expected and error.value.fix


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_the_name_of_lines_is_to_be_renamed(tmp_path, indent):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS, indent=indent).encode()))
    with pytest.raises(InputError) as error:
        rows(path)
    assert error.value.found == f"{path}: an array of objects"
    assert error.value.fix == f"mv {path} {tmp_path}/a.json.gz"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_empty_files_have_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert rows(tmp_path / name) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5), crlf=st.booleans(), ascii_=st.booleans()
)
def test_json_lines_round_trip(tmp_path_factory, items, crlf, ascii_):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = ("\r\n" if crlf else "\n").join(json.dumps(item, ensure_ascii=ascii_) for item in items)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert rows(path) == items
    except InputError as error:  # a bare half of a surrogate pair is no UTF-8
        assert "not UTF-8" in error.found and any("\ud800" <= c <= "\udfff" for c in text)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), name=st.sampled_from([n for n in FORMATS if supported(n)]))
def test_no_bytes_break_the_reader(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(isinstance(row, dict) for row in rows(path))


def test_what_cannot_be_read_twice_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="a named pipe"):
        rows(tmp_path / "pipe.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    with pytest.raises(InputError, match="a device"):
        rows(tmp_path / "null.jsonl")


def test_links_that_lead_nowhere_or_round_are_named(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "not_there.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, word in (("gone", "not_there.jsonl"), ("loop", "symbolic link")):
        with pytest.raises(InputError, match="symbolic link") as error:
            rows(tmp_path / f"{name}.jsonl")
        assert word in error.value.found
