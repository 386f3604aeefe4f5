"""Labels that say which of two answers is better: their codes, and what is said where they are left out."""

import json

import pytest

from jaxalign.config import defaults
from jaxalign.data.mixture import load_records
from jaxalign.errors import InputError
from jaxalign.pipeline.overrides import override
from jaxalign.registry import ALGORITHMS, PAIRS

MAP = {"prompt": "q", "chosen": "answer_a", "rejected": "answer_b"}


@pytest.fixture
def write(tmp_path):
    def run(labels, name="x.jsonl"):
        sides = [{"q": f"Q{i}", "answer_a": f"A{i}", "answer_b": f"B{i}"} for i in range(len(labels))]
        rows = [{**side, "label": label} for side, label in zip(sides, labels, strict=True)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return run


def winners(path, label, purpose="dpo", **options):
    records, tally = load_records(
        {"path": path, "columns": {**MAP, "preference": label}}, ALGORITHMS[purpose].reads, **options
    )
    return "".join(record.chosen[0] for record in records), tally


def test_a_map_says_what_codes_mean(write):
    zero_based = {"column": "label", "first": 0, "second": 1, "tie": 2}
    said, tally = winners(write([0, 1, 2, 1, 0, "1", None]), zero_based)
    assert said == "ABBAB" and tally.dropped == {"no preference between the sides": 2}
    arena = {"column": "label", "first": "model_a", "second": "model_b", "tie": ["tie", "tie (bothbad)"]}
    assert winners(write(["model_b", "model_a", "tie", "tie (bothbad)", "Model_B"]), arena)[0] == "BAB"
    assert winners(write([True, False]), {"column": "label", "first": True, "second": False})[0] == "AB"
    assert winners(write([1, 2]), "label")[0] == "AB"


def test_a_map_survives_the_command_line_and_a_config(write):
    source = {"path": write([0, 1]), "columns": {**MAP, "preference": {"column": "label", "first": 0, "second": 1}}}
    config = defaults("dpo")
    override(config, "data.sources", json.dumps([source]))
    for sources in (config.data.sources, [source]):
        assert [record.chosen for record in load_records(sources, PAIRS)[0]] == ["A0", "B1"]


@pytest.mark.parametrize("purpose", ["dpo", "reward", "sft"])
@pytest.mark.parametrize("max_records", [None, 3])
def test_codes_that_fit_no_map_are_an_error_with_their_counts(write, purpose, max_records):
    path = write([1, 2, 0, 1, 0, 2, 2])
    with pytest.raises(InputError) as error:
        winners(path, "label", purpose, max_records=max_records)
    assert f"{path}:3: 'label' is 0" in error.value.found and "0 (2), 1 (2), 2 (3)" in error.value.found
    fix = error.value.fix
    line = json.loads(fix[fix.index("(") + 1 : fix.index(",)")])
    assert set(line["columns"]["preference"]) == {"column", "first", "second", "tie"}
    assert load_records(line, ALGORITHMS[purpose].reads)[0], "the fix runs"


def test_unknown_codes_stop_even_where_bad_rows_are_skipped(write):
    with pytest.raises(InputError, match="no code of the preference map"):
        winners(write([1, 2, 1, 7]), "label", on_error="skip")


@pytest.mark.parametrize(
    ("preference", "word"),
    [
        ({"column": "label"}, "no code for first or second"),
        ({"first": 0, "second": 1}, "column is None"),
        ({"column": "label", "first": 0, "second": [0, 1]}, "both first and second"),
        ({"column": "label", "first": 0, "second": 1, "draw": 2}, "'draw' is none of"),
        ({"column": "label", "first": None, "second": 1}, "not a code"),
        ({"column": "lable", "first": 0, "second": 1}, "no column 'lable'"),
    ],
)
def test_a_broken_map_is_an_error(write, preference, word):
    with pytest.raises(InputError, match=word):
        winners(write([0, 1]), preference)


@pytest.mark.parametrize("purpose", ["dpo", "reward", "sft"])
def test_two_answers_without_their_label_are_refused(write, purpose):
    path = write([0, 1, 2, 1])
    with pytest.raises(InputError) as error:
        load_records({"path": path, "columns": MAP}, ALGORITHMS[purpose].reads)
    assert "'label' holds 0 (1), 1 (2), 2 (1)" in error.value.found and '"preference": {' in error.value.fix
    always = {**MAP, "preference": {"column": "label", "first": [0, 1, 2]}}
    assert len(load_records({"path": path, "columns": always}, ALGORITHMS[purpose].reads)[0]) == 4


def test_two_answers_without_any_label_are_taken_with_a_warning(write):
    source = {"path": write([None, None]), "columns": MAP}
    records, tally = load_records(source, PAIRS)
    assert len(records) == 2 and "answer_a counts as better" in tally.warnings[0]
    assert tally.to_dict()["warnings"] == tally.warnings


@pytest.mark.parametrize("names", ["output_1 output_2", "response_0 response_1", "textA textB", "reply-A reply-B"])
def test_answers_and_label_are_both_named_where_pairs_are_missing(tmp_path, names):
    one, two = names.split()
    rows = [{"instruction": "Q", one: f"A{i}", two: f"B{i}", "winner": i % 3, "model": "m"} for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        load_records(str(tmp_path / "x.jsonl"), PAIRS)
    for word in (one, two, "winner", "0 (3), 1 (3), 2 (3)"):
        assert word in error.value.found
    fix = error.value.fix
    line = json.loads(fix[fix.index("(") + 1 : fix.index(",)")])
    assert line["columns"]["chosen"] == one and line["columns"]["preference"]["column"] == "winner"
    assert load_records(line, PAIRS)[0]


def test_alpaca_eval_as_it_comes(shared):
    """Real labels: 1 and 2, 95 zeros, five halves and eleven nulls among 11,270."""
    path = str(shared / "data/alpaca_eval-gpt4-pairs")
    with pytest.raises(InputError) as error:
        load_records(path, PAIRS)
    assert "'output_1' and 'output_2'" in error.value.found and "'preference'" in error.value.found
    mapped = {"prompt": "instruction", "chosen": "output_1", "rejected": "output_2"}
    with pytest.raises(InputError) as error:
        load_records({"path": path, "columns": mapped}, PAIRS)
    assert "'preference' holds" in error.value.found
    with pytest.raises(InputError) as error:
        load_records({"path": path, "columns": {**mapped, "preference": "preference"}}, PAIRS)
    assert "0 (95), 1 (3976), 1.5 (5), 2 (7183)" in error.value.found
    fix = error.value.fix
    line = json.loads(fix[fix.index("(") + 1 : fix.index(",)")])
    assert line["columns"]["preference"] == {"column": "preference", "first": 1, "second": 2, "tie": [0, 1.5]}
    records, tally = load_records(line, PAIRS)
    assert len(records) == 11155 and tally.dropped["no preference between the sides"] == 111


@pytest.mark.parametrize("name", ["llamafactory-demo/dpo_en_demo.json", "oasst-sample/en_100_tree.jsonl"])
def test_sets_that_name_their_sides_need_no_label(shared, name):
    assert load_records(str(shared / "data" / name), PAIRS)[1].warnings == []
