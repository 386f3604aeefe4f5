"""Data files that are broken, of another kind than their name says, or no files at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import socket

from tests.fuzz.case import REFUSED, RUNS, SOUND, Case
from tests.fuzz.world import DATA, train

FORMATS = ("x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz", "x.csv.gz", "x.parquet", "x.arrow")
_BINARY = ("x.jsonl.gz", "x.csv.gz", "x.parquet", "x.arrow")


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `datafiles`."""
    return [*_bytes(rng), *_names(rng), *_paths(), *_saved()]


def encode(rows: list[dict], name: str) -> bytes:
    """Rows as a file of the format that its name says."""
    if name.endswith(".gz"):
        return gzip.compress(encode(rows, name.removesuffix(".gz")), mtime=0)
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if name.endswith(".json"):
        return json.dumps(rows, ensure_ascii=False).encode()
    if name.endswith((".csv", ".tsv")):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if name.endswith(".csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    import pyarrow
    import pyarrow.parquet

    table, out = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, out)
    else:
        with pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    return out.getvalue()


def good_rows(world, algorithm: str) -> list[dict]:
    """Records that the algorithm reads."""
    return [json.loads(line) for line in (world / f"{DATA[algorithm]}.jsonl").read_text().splitlines()]


def _bytes(rng):
    """A good file of each format, damaged."""
    middle = lambda data: len(data) // 2  # noqa: E731
    damages = {
        "empty": (lambda d, r: b"", REFUSED),
        "newline": (lambda d, r: b"\n", REFUSED),
        "spaces": (lambda d, r: b"   \n  \n", REFUSED),
        "half": (lambda d, r: d[: middle(d)], None),
        "last-byte": (lambda d, r: d[:-1], SOUND),
        "first-byte": (lambda d, r: d[1:], SOUND),
        "random": (lambda d, r: r.randbytes(len(d)), REFUSED),
        "zeros": (lambda d, r: bytes(len(d)), REFUSED),
        "garbage-behind": (lambda d, r: d + r.randbytes(50), SOUND),
        "garbage-within": (lambda d, r: d[: middle(d)] + b"\xff\xfe\x00\x80" * 4 + d[middle(d) :], REFUSED),
        "nul-within": (lambda d, r: d[: middle(d)] + b"\0\0\0" + d[middle(d) :], SOUND),
        "utf-16": (lambda d, r: d.decode("latin-1").encode("utf-16"), REFUSED),
        "utf-16-le": (lambda d, r: d.decode("latin-1").encode("utf-16-le"), REFUSED),
        "utf-32": (lambda d, r: d.decode("latin-1").encode("utf-32"), REFUSED),
        "bom": (lambda d, r: b"\xef\xbb\xbf" + d, None),
        "twice": (lambda d, r: d + d, SOUND),
        "html": (lambda d, r: b"<!DOCTYPE html><html><body>404</body></html>", REFUSED),
        "lfs-pointer": (lambda d, r: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", REFUSED),
        "flipped": (_flipped, SOUND),
    }
    for name in FORMATS:
        for damage, (change, expect) in damages.items():
            algorithm = rng.choice(("sft", "dpo", "ppo"))
            if expect is None:
                binary = name in _BINARY
                expect = {"half": SOUND if ".csv" in name or ".tsv" in name else REFUSED, "bom": RUNS}[damage]
                expect = REFUSED if binary else expect
            if damage in ("utf-16", "utf-32") and name not in _BINARY:
                expect = SOUND
            if damage in ("nul-within", "garbage-within") and name == "x.parquet":
                expect = SOUND

            seed = rng.random()

            def make(place, name=name, change=change, algorithm=algorithm, seed=seed):
                data = change(encode(good_rows(place.world, algorithm), name), random.Random(seed))
                (place.here / name).write_bytes(data)
                return train(place, algorithm, f"c.data.sources = ({name!r},)", dry=True)

            yield Case("datafiles", f"{name}-{damage}-{algorithm}", make, expect, ("x.",) if expect == REFUSED else ())
    for name, encoding in (("x.jsonl", "latin-1"), ("x.csv", "cp1252"), ("x.json", "utf-16")):

        def make(place, name=name, encoding=encoding):
            (place.here / name).write_bytes(
                encode([{"prompt": "Zoë", "completion": " déjà vu"}] * 8, name).decode().encode(encoding)
            )
            return train(place, "sft", f"c.data.sources = ({name!r},)", dry=True)

        expect = SOUND if encoding == "utf-16" else REFUSED
        yield Case("datafiles", f"{name}-encoded-{encoding}", make, expect, ("utf-8",))
    separated = "prompt;completion\n" + "a;b\n" * 8
    for name, text, expect, words in (
        ("semicolons", separated, SOUND, ()),
        ("pipes", separated.replace(";", "|"), SOUND, ()),
        ("carets", separated.replace(";", "^"), REFUSED, ("'^'",)),
        ("tabs-in-csv", separated.replace(";", "\t"), SOUND, ()),
        ("more-cells", "prompt,completion\na,b,c\n", REFUSED, ("x.csv:2",)),
        ("fewer-cells", "prompt,completion\na\n", REFUSED, ("x.csv:2",)),
        ("open-quote", 'prompt,completion\n"a,b\n', REFUSED, ("x.csv:2",)),
        ("no-header", "a,b\nc,d\n", REFUSED, ("prompt",)),
        ("header-only", "prompt,completion\n", REFUSED, ()),
        ("same-columns", "prompt,prompt\na,b\n", REFUSED, ("prompt",)),
        ("blank-column", "prompt,,completion\na,b,c\n" * 1 + "d,e,f\n" * 8, SOUND, ()),
        ("crlf", separated.replace(";", ",").replace("\n", "\r\n"), RUNS, ()),
        ("cr", separated.replace(";", ",").replace("\n", "\r"), SOUND, ()),
        ("large-cell", "prompt,completion\n" + "a,b\n" * 8 + "c," + "x" * 300_000 + "\n", SOUND, ()),
    ):

        def make(place, text=text):
            (place.here / "x.csv").write_text(text, newline="")
            return train(place, "sft", "c.data.sources = ('x.csv',)", dry=True)

        yield Case("datafiles", f"csv-{name}", make, expect, words)
    for name, text, expect in (
        ("number", "3", REFUSED),
        ("text", '"abc"', REFUSED),
        ("null", "null", REFUSED),
        ("numbers", "[1, 2]", REFUSED),
        ("lists", '[["a", "b"]]', REFUSED),
        ("empty-list", "[]", REFUSED),
        ("empty-object", "{}", REFUSED),
        ("ragged-columns", '{"prompt": ["a", "b"], "completion": ["c"]}', REFUSED),
        ("columns", json.dumps({"prompt": ["a"] * 8, "completion": ["b"] * 8}), RUNS),
        ("two-lists", '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', REFUSED),
        ("wrapped", json.dumps({"data": [{"prompt": "a", "completion": "b"}] * 8}), RUNS),
        ("nested-deep", "[" * 100_000 + "]" * 100_000, REFUSED),
        ("digits", '[{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}]", REFUSED),
        ("trailing-comma", '[{"prompt": "a"},]', REFUSED),
        ("single-quotes", "[{'prompt': 'a'}]", REFUSED),
        ("comment", '// x\n[{"prompt": "a"}]', REFUSED),
        ("ends-early", '[{"prompt": "a", "completion"', REFUSED),
    ):
        for file in ("x.json", "x.jsonl"):

            def make(place, text=text, file=file):
                (place.here / file).write_text(text)
                return train(place, "sft", f"c.data.sources = ({file!r},)", dry=True)

            lines = file == "x.jsonl" and expect == RUNS
            yield Case("datafiles", f"{file}-{name}", make, REFUSED if lines else expect, ("x.json",))


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _names(rng):
    """A whole file under another format's name."""
    for real in ("x.jsonl", "x.csv", "x.jsonl.gz", "x.parquet", "x.arrow"):
        for named in ("y.jsonl", "y.json", "y.csv", "y.jsonl.gz", "y.parquet", "y.arrow", "y.txt", "y.zip", "y"):
            if real[1:] == named[1:]:
                continue
            expect = RUNS if (real, named) == ("x.jsonl", "y.json") else REFUSED

            def make(place, real=real, named=named):
                (place.here / named).write_bytes(encode(good_rows(place.world, "sft"), real))
                return train(place, "sft", f"c.data.sources = ('./{named}',)", dry=True)

            yield Case("datafiles", f"{real}-named-{named}", make, expect, ("y",))


def _paths():
    """Paths at which no data are."""

    def case(name, prepare, path="x.jsonl", expect=REFUSED, words=(), evaluation=False):
        def make(place):
            prepare(place)
            field = "eval_sources" if evaluation else "sources"
            return train(place, "sft", f"c.data.{field} = ({path!r},)", dry=True)

        return Case("datafiles", f"path-{name}{'-eval' if evaluation else ''}", make, expect, words, limit=30.0)

    def deep(place):
        for _ in range(3):
            (place.here / "d").mkdir(exist_ok=True)
        (place.here / "d" / "again").symlink_to("../d")
        (place.here / "d" / "x.jsonl").write_bytes(encode(good_rows(place.world, "sft"), "x.jsonl"))

    def listen(place):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("x.jsonl")

    def copy(name):
        return lambda p: (p.here / name).write_bytes(encode(good_rows(p.world, "sft"), "x.jsonl"))

    nothing = lambda p: None  # noqa: E731
    for evaluation in (False, True):
        yield case("fifo", lambda p: os.mkfifo("x.jsonl"), words=("x.jsonl",), evaluation=evaluation)
        yield case("dangling", lambda p: os.symlink("gone", "x.jsonl"), words=("x.jsonl",), evaluation=evaluation)
        yield case("loop", lambda p: os.symlink("x.jsonl", "x.jsonl"), words=("x.jsonl",), evaluation=evaluation)
        yield case("missing", nothing, words=("x.jsonl",), evaluation=evaluation)
    yield case("fifo-in-directory", lambda p: (os.mkdir("d"), os.mkfifo("d/x.jsonl")), "d")
    yield case("dangling-in-directory", lambda p: (os.mkdir("d"), os.symlink("gone", "d/x.jsonl")), "d")
    yield case("zero-device", lambda p: os.symlink("/dev/zero", "x.jsonl"))
    yield case("null-device", lambda p: os.symlink("/dev/null", "x.jsonl"))
    yield case("random-device", lambda p: os.symlink("/dev/urandom", "x.jsonl"))
    yield case("socket", listen)
    yield case("directory-of-that-name", lambda p: os.mkdir("x.jsonl"))
    yield case("directory-empty", lambda p: os.mkdir("d"), "d")
    yield case("directory-of-readme", lambda p: (os.mkdir("d"), (p.here / "d/README.md").write_text("x")), "d")
    yield case("directory-in-circles", deep, "d", SOUND)
    yield case("directory-looping", lambda p: (os.mkdir("d"), os.symlink("../d", "d/d"), os.symlink("y", "d/y")), "d")
    yield case("tilde-nobody", nothing, "~nobody-here/x.jsonl")
    yield case("nul", nothing, "x\0.jsonl")
    yield case("newline", nothing, "x\n.jsonl")
    yield case("surrogate", nothing, "x\ud83d.jsonl")
    yield case("long-name", nothing, "x" * 300 + ".jsonl")
    yield case("long-path", nothing, "/".join(["x" * 100] * 15) + ".jsonl")
    yield case("glob-nothing", nothing, "*.jsonl")
    yield case("glob-open", nothing, "[x.jsonl")
    yield case("glob-all", copy("x.jsonl"), "./**", SOUND)
    yield case("brackets-in-name", copy("x[1].jsonl"), "x[1].jsonl", RUNS)
    yield case("unknown-scheme", nothing, "nosuch://x.jsonl")
    yield case("empty-scheme", nothing, "://x.jsonl")
    yield case("memory", nothing, "memory://x.jsonl")
    yield case("file-url", nothing, "file:/" + "//proc/nowhere/x.jsonl")
    yield case("hub-id", nothing, "nobody/nothing")
    yield case("hub-name", nothing, "nothing")
    yield case("hub-traversal", nothing, "../../nothing")
    yield case("memory-device", nothing, "/proc/self/mem", SOUND)
    yield case("proc", nothing, "/proc/self/cmdline")
    yield case("dot", nothing, ".")
    yield case("train-is-eval", lambda p: None, "x.jsonl", evaluation=True, words=("x.jsonl",))._replace(
        name="path-missing-again-eval"
    )


def _saved():
    """Directories that look like those that `datasets` saves."""
    files = {
        "state-empty": {"state.json": "", "dataset_info.json": ""},
        "state-object": {"state.json": "{}", "dataset_info.json": "{}"},
        "state-text": {"state.json": '"x"', "dataset_info.json": "[]"},
        "state-files-gone": {
            "state.json": '{"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "x", '
            '"_format_columns": null, "_format_kwargs": {}, "_format_type": null, '
            '"_output_all_columns": false, "_split": null}',
            "dataset_info.json": '{"features": {"prompt": {"dtype": "string", "_type": "Value"}}}',
        },
        "dict-empty": {"dataset_dict.json": ""},
        "dict-no-splits": {"dataset_dict.json": '{"splits": []}'},
        "dict-splits-gone": {"dataset_dict.json": '{"splits": ["train"]}'},
        "dict-number": {"dataset_dict.json": "3"},
        "readme-configs-gone": {
            "README.md": "---\nconfigs:\n- config_name: default\n  data_files: gone.jsonl\n---\n",
        },
        "readme-yaml-broken": {"README.md": "---\nconfigs: [\n---\n", "x.jsonl": '{"text": "a"}\n'},
        "readme-binary": {"README.md": "---\0\nconfigs:\n---\n"},
    }
    for name, content in files.items():

        def make(place, content=content):
            (place.here / "d").mkdir()
            for file, text in content.items():
                (place.here / "d" / file).write_text(text)
            return train(place, "sft", "c.data.sources = ('./d',)", dry=True)

        yield Case("datafiles", f"saved-{name}", make, SOUND if name == "readme-yaml-broken" else REFUSED, ("d",))
