"""The token cache: whole or not there, never stale, safe for several writers."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data.cache import digest, digest_records, digest_tokenizer, open_or_write
from jaxalign.data.records import Record
from jaxalign.data.tokenize import Example
from jaxalign.errors import InputError


def _pairs(n=5):
    for i in range(n):
        record = Record(
            i, "s", i + 1, "pair", prompt=f"p{i}", chosen="a", rejected=[{"role": "assistant"}], columns={"k": i}
        )
        said = (np.arange(i + 1), np.arange(100, 102 + i))
        masks = (np.arange(i + 1) % 2 == 0, np.ones(i + 2, bool))
        yield record, Example(i, np.arange(10, 13 + i), said, masks, (True, i % 2 == 0), 1.0 + i, -i)


def _write(root, key="k", n=5):
    calls = []

    def examples(counts):
        calls.append(key)
        counts["dropped: x"] += 2
        yield from _pairs(n)

    return open_or_write(root, key, examples), calls


def test_what_is_written_is_read(tmp_path):
    store, calls = _write(tmp_path)
    again, no_calls = _write(tmp_path)
    assert (calls, no_calls) == (["k"], [])
    assert again.meta["counts"] == {"dropped: x": 2} and len(again) == 5
    for i, (record, example) in enumerate(_pairs()):
        got = again.example(i)
        assert again.record(i) == record
        assert [a.tolist() for a in (got.prompt, *got.completions, *got.masks)] == [
            a.tolist() for a in (example.prompt, *example.completions, *example.masks)
        ]
        assert (got.complete, got.weight, got.score) == (example.complete, example.weight, example.score)
        assert again.table["scored"][i].tolist() == [m.sum() for m in example.masks]
    assert store.directory == again.directory


@pytest.mark.parametrize(
    "damage", ["tokens.bin", "scored.bin", "records.jsonl", "table.npy", "meta.json", "record_ends.npy"]
)
def test_a_damaged_cache_is_written_anew(tmp_path, damage):
    store, _ = _write(tmp_path)
    file = store.directory / damage
    file.write_bytes(file.read_bytes()[:-3])
    again, calls = _write(tmp_path)
    assert calls == ["k"] and again.example(4).prompt.tolist() == list(range(10, 17))
    (again.directory / damage).unlink()
    assert _write(tmp_path)[1] == ["k"]


@pytest.mark.parametrize(
    "damage", ["tokens.bin", "scored.bin", "records.jsonl", "table.npy", "meta.json", "record_ends.npy"]
)
def test_a_flipped_bit_anywhere_is_found(tmp_path, damage):
    store, _ = _write(tmp_path)
    file = store.directory / damage
    whole = file.read_bytes()
    for place in {0, len(whole) // 3, len(whole) - 2}:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        again, calls = _write(tmp_path)
        assert calls == ["k"] and file.read_bytes() == whole
        assert damage in again.damage or damage == "meta.json"
    assert _write(tmp_path)[0].damage == ""


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"format": 3}', "\0\0"])
def test_a_meta_file_of_something_else_is_written_anew(tmp_path, content):
    store, _ = _write(tmp_path)
    (store.directory / "meta.json").write_text(content)
    assert _write(tmp_path)[1] == ["k"] and _write(tmp_path)[1] == []


def test_a_cache_that_cannot_be_made_names_its_field(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for root in (tmp_path / "file", tmp_path / "file" / "cache", tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cache of tokens") as error:
            _write(root)
        assert "data.cache_dir" in error.value.fix


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        _write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["k.lock"]


def test_an_older_format_is_written_anew(tmp_path):
    store, _ = _write(tmp_path)
    meta = json.loads((store.directory / "meta.json").read_text())
    (store.directory / "meta.json").write_text(json.dumps(meta | {"format": -1}))
    assert _write(tmp_path)[1] == ["k"]


def test_an_error_leaves_no_cache(tmp_path):
    def fails(counts):
        yield next(_pairs())
        raise ValueError("bad record")

    with pytest.raises(ValueError, match="bad record"):
        open_or_write(tmp_path, "k", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["k.lock"]
    assert _write(tmp_path)[1] == ["k"]


def test_a_killed_writer_leaves_nothing_that_is_used(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_token_cache import _pairs, open_or_write
        def examples(counts):
            for i, pair in enumerate(_pairs()):
                if i == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield pair
        open_or_write({str(tmp_path)!r}, "k", examples)
    """
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=path)
    assert done.returncode == -9
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [".tmp"]
    assert _write(tmp_path)[1] == ["k"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["k"]  # the leftovers are gone


def test_several_writers_agree(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: _write(tmp_path)[0], range(8)))
    assert {s.directory for s in stores} == {tmp_path / "k"}
    assert all(s.example(2).weight == 3.0 for s in stores)


def test_writers_without_locks_agree(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    test_several_writers_agree(tmp_path)


def test_digests_change_with_what_they_are_of(tokenizer_of):
    records = [r for r, _ in _pairs()]
    assert digest_records(records) == digest_records(list(records)) != digest_records(records[:4])
    assert digest_records(records) != digest_records([records[0]._replace(weight=2.0), *records[1:]])
    assert digest("ab", "c") != digest("a", "bc")
    one, other = (tokenizer_of(f"models/{name}") for name in ("stories3m-llama", "stories260k-llama"))
    digests = {digest_tokenizer(one, [1], {2}), digest_tokenizer(other, [1], {2}), digest_tokenizer(one, [], {2})}
    digests |= {digest_tokenizer(one, [1], {1, 2})}
    assert len(digests) == 4
