"""Data is read, mixed and tokenised without being held: what Python allocates does not grow with its bytes."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data import build, spool
from jaxalign.data.mixture import load_records
from jaxalign.data.records import Record
from jaxalign.data.split import Groups
from jaxalign.errors import InputError
from jaxalign.registry import COMPLETIONS

_WORDS = "once upon a time there was a small dog who liked to run "


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small data behaves as large data does."""
    monkeypatch.setattr(spool, "_IN_MEMORY", 1 << 16)
    monkeypatch.setattr("jaxalign.data.tokenize._CHUNK", 16)


def _write(path, count, size):
    lines = ({"prompt": f"{i}: ", "completion": (_WORDS * (size // len(_WORDS) + 1))[:size]} for i in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def _peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_reading_and_mixing_hold_little(tmp_path, name):
    peaks, sizes = [], []
    for count in (20, 300, 3000):  # the first imports
        path = _write(tmp_path / name, count, 4000)
        sources = ({"path": path, "weight": 1.5}, path)
        peaks.append(_peak(lambda sources=sources: sum(1 for _ in load_records(sources, COMPLETIONS)[0])))
        sizes.append(os.path.getsize(path))
    assert peaks[2] - peaks[1] < 0.05 * (sizes[2] - sizes[1])


def test_building_holds_little(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("models/stories3m-llama")
    peaks, sizes = [], []
    for count in (300, 300, 300, 900, 900):  # the first imports
        config = defaults("sft")
        config.workdir, config.batch_size, config.data.packing = str(tmp_path / f"{len(peaks)}"), 8, False
        config.data.sources, config.data.truncation = (_write(tmp_path / "a.jsonl", count, 1000),), "keep_start"
        peaks.append(_peak(lambda config=config: build.build(config, tokenizer)))
        sizes.append(os.path.getsize(tmp_path / "a.jsonl"))
    # The least of two: threads that other tests have left allocate too.
    assert min(peaks[3:]) - min(peaks[1:3]) < 0.3 * (sizes[3] - sizes[1])


def test_a_spool_gives_back_what_it_got(tmp_path):
    odd = {"nan": float("inf"), "nested": [{"a": None, "b": (1, 2)}], "bytes": b"\0", "half": "\ud83d"}
    records = [
        Record(0, "file", i, "text", text="x" * (i % 997), weight=i / 3, columns={**odd, "i": i}) for i in range(500)
    ]
    kept = spool.Spool(iter(records), tmp_path)
    assert kept._file is not None and os.listdir(tmp_path) == [], "a file without a name: no kill leaves it behind"
    assert len(kept) == 500 and [kept[i] for i in range(500)] == records
    order = np.random.default_rng(0).permutation(500)
    mixed = spool.Records([kept, kept], order % 2, order)
    assert [r.line for r in mixed] == order.tolist() and [r.index for r in mixed] == list(range(500))
    assert mixed[-1] == records[order[-1]]._replace(index=499) and mixed[3:5] == [mixed[3], mixed[4]]
    with pytest.raises(IndexError):
        mixed[500]


def test_small_data_needs_no_file(tmp_path):
    kept = spool.Spool((Record(0, "file", i, "text", text="x") for i in range(100)), tmp_path / "missing")
    assert kept._file is None and [kept[i].line for i in (99, 0)] == [99, 0]
    assert len(spool.Spool(iter(()), tmp_path)) == 0


def test_threads_may_read_a_spool_at_once(tmp_path):
    records = [Record(i, "s", i + 1, "text", text=f"{i}" * 300) for i in range(1000)]
    found = spool.Spool(records, tmp_path)
    with ThreadPoolExecutor(4) as threads:
        places = [np.random.default_rng(t).integers(0, 1000, 500).tolist() for t in range(4)]
        read = threads.map(lambda own: [found[i] for i in own], places)
    assert list(read) == [[records[i] for i in own] for own in places]


def test_a_directory_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    real = spool.tempfile.TemporaryFile

    def refused(*args, dir=None, **kwargs):
        if dir is not None:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, **kwargs)

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", refused)
    records = [Record(i, "s", i + 1, "text", text="x" * 1000) for i in range(200)]
    assert list(map(spool.Spool(records, tmp_path).__getitem__, range(200))) == records


def test_a_value_that_cannot_be_stored_is_named_by_its_records(tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match=r"f\.jsonl:7"):
        spool.Spool([Record(0, "f.jsonl", 7, "text", text="a", columns={"tree": deep})], tmp_path)


def test_a_killed_build_leaves_no_records_behind(tmp_path):
    code = (
        "import itertools, os, sys\n"
        "from jaxalign.data.spool import Spool\n"
        "from jaxalign.data.records import Record\n"
        "def rows():\n"
        "    for i in itertools.count():\n"
        "        if i == 300: print('half way', flush=True); sys.stdin.read()\n"
        "        yield Record(0, 's', i, 'text', text=str(i) * 20_000)\n"
        "Spool(rows(), sys.argv[1])\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as child:
        assert child.stdout.readline() == b"half way\n"
        child.terminate()
    assert child.returncode == -15 and os.listdir(tmp_path) == []


def _groups_by_hand(records):
    """The prompt of the first record that each is linked to, by walking over all pairs."""
    links = [{j for j, b in enumerate(records) if a.prompt == b.prompt or a.origin == b.origin} for a in records]
    firsts = []
    for i in range(len(records)):
        seen, waiting = {i}, [i]
        while waiting:
            waiting += (new := links[waiting.pop()] - seen)
            seen |= new
        firsts.append(min(seen))
    return firsts


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_those_of_a_walk(seed):
    rng = np.random.default_rng(seed)
    records = [
        Record(i, f"f{rng.integers(2)}", int(rng.integers(1, 25)), "prompt", prompt=f"p{rng.integers(25)}")
        for i in range(int(rng.integers(0, 40)))
    ]
    groups = Groups()
    keys = [groups.add(record) for record in records]
    assert groups.finish().tolist() == [keys[first] for first in _groups_by_hand(records)]
    chain = Groups()  # each linked to the one before, by prompt and origin in turn
    long = [Record(i, "f", (i + 1) // 2, "prompt", prompt=f"p{i // 2}") for i in range(200)]
    first, *_ = [chain.add(record) for record in long]
    assert set(chain.finish().tolist()) == {first}
