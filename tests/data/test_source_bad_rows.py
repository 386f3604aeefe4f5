"""Rows that are wrong: they stop a run, or are skipped, counted and shown, up to a share."""

import gzip
import json
import os

import pytest

from jaxalign.config import defaults
from jaxalign.data.build import build
from jaxalign.data.mixture import load_records
from jaxalign.data.report import as_text
from jaxalign.errors import InputError
from jaxalign.pipeline.keys import file_digest
from jaxalign.registry import PAIRS

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}
BAD_LINES = {
    "not JSON": b'{"prompt": "Q", "chos',
    "no JSON object": b"[1, 2]",
    "not UTF-8": '{"prompt": "é"}'.encode("latin-1"),
    "chosen is the number ...": json.dumps({**GOOD, "chosen": 5}).encode(),
    "no 'rejected'": b'{"prompt": "Q", "chosen": "A"}',
}


@pytest.fixture
def mixed(tmp_path):
    """Ninety-five good rows, and one that is wrong behind each nineteen of them."""
    lines = []
    for number, bad in enumerate(BAD_LINES.values()):
        lines += [json.dumps({**GOOD, "prompt": f"Q{number} {i}"}).encode() for i in range(19)] + [bad]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return str(tmp_path / "x.jsonl")


def test_the_first_wrong_row_stops_and_names_the_way_on(mixed):
    with pytest.raises(InputError) as error:
        load_records(mixed, PAIRS, field="data.sources")
    assert f"{mixed}:20" in error.value.found and "data.on_error=skip" in error.value.fix
    with pytest.raises(InputError) as error:
        load_records(mixed, PAIRS)
    assert "--config" not in error.value.fix, "no configuration is at hand"


def test_wrong_rows_are_skipped_and_counted(mixed):
    records, tally = load_records(mixed, PAIRS, on_error="skip")
    assert len(records) == tally.kept == 95 and tally.read == 100
    assert tally.skipped == dict.fromkeys(BAD_LINES, 1)
    assert tally.examples["not JSON"] == [f"{mixed}:20"] and tally.examples["no 'rejected'"] == [f"{mixed}:100"]
    assert tally.sources[0]["skipped"] == tally.skipped
    again, _ = load_records(gzip_of(mixed), PAIRS, on_error="skip")
    assert [r.prompt for r in again] == [r.prompt for r in records]


def gzip_of(path):
    with open(path, "rb") as file, gzip.open(path + ".gz", "wb") as out:
        out.write(file.read())
    return path + ".gz"


@pytest.mark.parametrize(("most", "stops"), [(0.01, True), (0.049, True), (0.05, False), (1, False)])
def test_more_wrong_rows_than_the_limit_stop(mixed, most, stops):
    if not stops:
        assert load_records(mixed, PAIRS, on_error="skip", max_skipped=most)[1].skipped
        return
    with pytest.raises(InputError, match="5 of 100 rows are wrong") as error:
        load_records(mixed, PAIRS, on_error="skip", max_skipped=most)
    assert "--config.data.max_skipped=0.05" in error.value.fix and "not JSON" in error.value.found


def test_other_formats_skip_rows_too(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nQ,A,B\nQ,A\nP,A,B\n")
    (tmp_path / "x.json").write_text(json.dumps([GOOD, 3, {**GOOD, "rejected": ["B"]}]))
    tree = {"message_tree_id": "t", "prompt": {"message_id": "m", "role": "wizard", "text": "Q", "replies": []}}
    node = {"message_id": "m", "role": "prompter", "text": "Q"}
    replies = [{"message_id": i, "role": "assistant", "text": f"A{i}", "rank": r} for i, r in enumerate((0, 1, "x"))]
    whole = {"message_tree_id": "u", "prompt": {**node, "replies": replies}}
    (tmp_path / "x.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(tree) + "\n")
    for name, kept, skipped in (("x.csv", 2, 1), ("x.json", 1, 2), ("x.jsonl", 1, 2)):
        path = str(tmp_path / name)
        with pytest.raises(InputError, match="on_error=skip"):
            load_records(path, PAIRS, field="data.sources")
        records, tally = load_records(path, PAIRS, on_error="skip")
        assert (len(records), sum(tally.skipped.values())) == (kept, skipped), name


def test_the_report_shows_what_was_skipped(mixed, tmp_path, shared):
    from transformers import AutoTokenizer

    config = defaults("dpo")
    config.workdir, config.data.sources, config.batch_size = str(tmp_path / "run"), (mixed,), 8
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models/stories3m-llama"))
    with pytest.raises(InputError):
        build(config, tokenizer)
    config.data.on_error = "skip"
    with pytest.raises(InputError, match=r"data\.max_skipped"):
        build(config, tokenizer)
    config.data.max_skipped = 0.1
    report = build(config, tokenizer).report
    assert report["records"]["skipped"] == dict.fromkeys(BAD_LINES, 1)
    assert any("5 of 100 rows are wrong and skipped" in said for said in report["warnings"])
    assert f"{mixed}:20" in as_text(report)


def test_a_stage_key_of_links_that_lead_nowhere(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "not_there")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("gone.jsonl", "loop.jsonl", "*.jsonl", "pipe.jsonl", "."):
        assert isinstance(file_digest(str(tmp_path / name)), str | None)  # and it comes to an end


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "set")
    assert len(load_records(str(tmp_path / "set"), PAIRS)[0]) == 1


def test_columns_that_hold_nothing_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({**GOOD, "chosen": None, "rejected": None}) + "\n")
    with pytest.raises(InputError, match="chosen, rejected: null in the first 1 records"):
        load_records(str(tmp_path / "x.jsonl"), PAIRS)


def test_a_mapped_score_that_nothing_reads_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({**GOOD, "stars": 3}) + "\n")
    source = {"path": str(tmp_path / "x.jsonl"), "columns": {"score": "stars"}}
    assert "without effect" in load_records(source, PAIRS)[1].warnings[0]
    assert load_records(source, PAIRS._replace(score=True))[1].warnings == []


def test_options_of_hub_sets_are_refused_for_saved_ones(tmp_path):
    import datasets

    datasets.Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    assert len(load_records(str(tmp_path / "saved"), PAIRS)[0]) == 1
    for option in ("name", "revision"):
        with pytest.raises(InputError, match=f"{option} 'x' of a directory"):
            load_records({"path": str(tmp_path / "saved"), option: "x"}, PAIRS)
