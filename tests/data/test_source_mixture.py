"""Mixtures: what a weight means, order, determinism, max_records, the tally."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import mixture
from jaxalign.data.mixture import load_records
from jaxalign.registry import COMPLETIONS


@pytest.fixture
def sets(tmp_path):
    def make(**counts):
        for name, count in counts.items():
            lines = "".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count))
            (tmp_path / f"{name}.jsonl").write_text(lines)
        return {name: str(tmp_path / f"{name}.jsonl") for name in counts}

    return make


def texts(*args, **kwargs):
    return [record.text for record in load_records(*args, **kwargs)[0]]


def test_one_source_keeps_its_order(sets):
    path = sets(a=5)["a"]
    records, tally = load_records(path, COMPLETIONS)
    assert [(r.text, r.index, r.line) for r in records] == [(f"a{i}", i, i + 1) for i in range(5)]
    assert {r.source for r in records} == {path}
    assert tally.sources == [
        {"path": path, "split": None, "weight": 1.0, "read": 5, "kept": 5, "used": 5, "dropped": {}, "skipped": {}}
    ]


@pytest.mark.parametrize(("weight", "used"), [(1, 10), (2, 20), (2.5, 25), (0.5, 5), (0.01, 1), (0.34, 3)])
def test_weight_is_how_often_each_record_is_drawn(sets, weight, used):
    source = {"path": sets(a=10)["a"], "weight": weight}
    records, tally = load_records(source, COMPLETIONS)
    counts = Counter(r.text for r in records)
    assert len(records) == used == tally.used and tally.kept == 10
    assert set(counts.values()) <= {int(weight), int(weight) + 1} and max(counts.values()) - int(weight) <= 1
    assert [r.index for r in records] == list(range(used))
    assert len({r.origin for r in records}) == len(counts), "repeated records share their origin"


def test_draw_is_a_function_of_the_seed(sets):
    source = {"path": sets(a=100)["a"], "weight": 0.5}
    one, again, other = (texts(source, COMPLETIONS, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_sources_are_interleaved_in_proportion(sets):
    paths = sets(a=60, b=20)
    mixed = [{"path": paths["a"]}, {"path": paths["b"], "weight": 2}]
    all_texts = texts(mixed, COMPLETIONS)
    assert len(all_texts) == 100
    assert [t for t in all_texts if t[0] == "a"] == [f"a{i}" for i in range(60)]
    for part in (10, 25, 50):
        share = sum(t[0] == "b" for t in all_texts[:part]) / part
        assert abs(share - 0.4) <= 1 / part + 1e-9
    assert texts(mixed, COMPLETIONS, max_records=10) == all_texts[:10]


def test_each_source_has_its_own_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "Q1", "a": "A1"}\n')
    (tmp_path / "b.jsonl").write_text('{"frage": "Q2", "antwort": "A2"}\n')
    sources = (
        {"path": str(tmp_path / "a.jsonl"), "columns": {"prompt": "q", "completion": "a"}},
        {"path": str(tmp_path / "b.jsonl"), "columns": {"prompt": "frage", "completion": "antwort"}},
    )
    records, _ = load_records(sources, COMPLETIONS)
    assert [(r.prompt, r.completion) for r in records] == [("Q1", "A1"), ("Q2", "A2")]


def test_max_records_reads_no_further(sets, monkeypatch):
    path = sets(a=5000)["a"]
    with open(path, "a") as file:
        file.write("broken, but never reached\n")
    records, tally = load_records(path, COMPLETIONS, max_records=7)
    assert len(records) == 7 and tally.kept == 7 and tally.read <= mixture._SAMPLE
    assert len(texts(sets(a=3)["a"], COMPLETIONS, max_records=7)) == 3


def test_drops_do_not_count_against_max_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n' * 10)
    records, tally = load_records(str(path), COMPLETIONS, max_records=4)
    assert len(records) == 4 and tally.dropped == {"empty text": 4}


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_interleaving_loses_nothing_and_is_even(sizes):
    sources, places = mixture._interleave([np.arange(size) for size in sizes])
    mixed = list(zip(sources.tolist(), places.tolist(), strict=True))
    assert sorted(mixed) == [(source, i) for source, size in enumerate(sizes) for i in range(size)]
    seen = [0] * len(sizes)
    for n, (source, _) in enumerate(mixed, 1):
        seen[source] += 1
        for have, size in zip(seen, sizes):
            assert abs(have - n * size / sum(sizes)) <= len(sizes)
