"""Published sets in their exact schemas: by name, by hub id, by their columns."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxalign.data.mixture import load_records
from jaxalign.errors import InputError
from jaxalign.registry import COMPLETIONS, PAIRS, PROMPTS

ULTRAFEEDBACK = pa.schema(
    [
        ("source", pa.string()),
        ("instruction", pa.string()),
        ("chosen_response", pa.string()),
        ("rejected_response", pa.string()),
        ("chosen_avg_rating", pa.float64()),
        ("rejected_avg_rating", pa.float64()),
        ("chosen_model", pa.string()),
    ]
)
_MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
CLEANED = pa.schema(
    [
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("chosen", _MESSAGES),
        ("chosen-rating", pa.float64()),
        ("chosen-model", pa.string()),
        ("rejected", _MESSAGES),
        ("rejected-rating", pa.float64()),
        ("rejected-model", pa.string()),
    ]
)
OASST = pa.schema(
    [
        ("message_id", pa.string()),
        ("parent_id", pa.string()),
        ("user_id", pa.string()),
        ("created_date", pa.string()),
        ("text", pa.string()),
        ("role", pa.string()),
        ("lang", pa.string()),
        ("review_count", pa.int32()),
        ("review_result", pa.bool_()),
        ("deleted", pa.bool_()),
        ("rank", pa.int32()),
        ("synthetic", pa.bool_()),
        ("model_name", pa.string()),
        ("detoxify", pa.struct([("toxicity", pa.float64())])),
        ("message_tree_id", pa.string()),
        ("tree_state", pa.string()),
        ("emojis", pa.struct([("name", pa.list_(pa.string())), ("count", pa.list_(pa.int32()))])),
        ("labels", pa.struct([("name", pa.list_(pa.string())), ("value", pa.list_(pa.float64()))])),
    ]
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parquet(path, rows, schema):
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """Makes `datasets.load_dataset` give rows under a hub id."""
    datasets = pytest.importorskip("datasets")
    sets = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: datasets.DatasetDict(train=sets[path]))

    def put(name, rows, schema=None):
        sets[name] = datasets.Dataset(pa.Table.from_pylist(rows, schema))

    return put


ULTRAFEEDBACK_ROWS = [
    {
        "source": "evol_instruct",
        "instruction": f"Question {i}",
        "chosen_response": f"Good {i}",
        "rejected_response": f"Bad {i}",
        "chosen_avg_rating": 4.75,
        "rejected_avg_rating": 2.5 if i else None,
        "chosen_model": "gpt-4",
    }
    for i in range(3)
]
CLEANED_ROWS = [
    {
        "source": "sharegpt",
        "prompt": f"Question {i}",
        "chosen": [user(f"Question {i}"), assistant(f"Good {i}")],
        "chosen-rating": 4.75,
        "chosen-model": "gpt-4",
        "rejected": [user(f"Question {i}"), assistant(f"Bad {i}")],
        "rejected-rating": 2.5 if i else None,
        "rejected-model": "alpaca-7b",
    }
    for i in range(3)
]
UF_SETS = {
    "argilla/ultrafeedback-binarized-preferences": (ULTRAFEEDBACK_ROWS, ULTRAFEEDBACK),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (CLEANED_ROWS, CLEANED),
}


def check_ultrafeedback(records):
    assert [r.prompt for r in records] == [[user(f"Question {i}")] for i in range(3)]
    assert [r.chosen for r in records] == [[assistant(f"Good {i}")] for i in range(3)]
    assert [r.rejected for r in records] == [[assistant(f"Bad {i}")] for i in range(3)]
    assert [r.score for r in records] == [0.0, 2.25, 2.25], "the margin is the difference of the ratings"
    assert records[0].columns["source"] in ("evol_instruct", "sharegpt")


def test_other_subsets_of_a_set_are_read_by_their_columns(hub):
    hub("Anthropic/hh-rlhf", [{"transcript": "\n\nHuman: Q\n\nAssistant: A", "rating": 4.0}])
    source = {"path": "Anthropic/hh-rlhf", "name": "red-team-attempts"}
    (record,), _ = load_records({**source, "columns": {"text": "transcript"}}, COMPLETIONS)
    assert record.text.startswith("\n\nHuman")
    with pytest.raises(InputError, match="columns transcript, rating") as error:
        load_records(source, COMPLETIONS)
    assert '"columns": {"text": "transcript"}' in error.value.fix


@pytest.mark.parametrize("name", UF_SETS)
def test_ultrafeedback(tmp_path, hub, name):
    rows, schema = UF_SETS[name]
    hub(name, rows, schema)
    check_ultrafeedback(load_records(name, PAIRS)[0])
    path = parquet(tmp_path / "x.parquet", rows, schema)
    check_ultrafeedback(load_records(path, PAIRS)[0])
    check_ultrafeedback(load_records({"path": path, "preset": "ultrafeedback-binarized-preferences"}, PAIRS)[0])
    assert load_records(name, COMPLETIONS)[0][1].completion == [assistant("Good 1")]
    assert load_records(name, PROMPTS)[0][1].prompt == [user("Question 1")]


def test_hh_rlhf_by_hub_id(hub):
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    hub("Anthropic/hh-rlhf", [row])
    (record,), _ = load_records("Anthropic/hh-rlhf", PAIRS)
    assert (record.prompt, record.chosen, record.rejected) == ([user("Q")], [assistant("A")], [assistant("B")])
    assert record.source == "Anthropic/hh-rlhf[train]"


def node(name, parent, role, text, rank=None, **more):
    row = {"message_id": name, "parent_id": parent, "message_tree_id": "t", "role": role, "text": text, "rank": rank}
    row |= {"lang": "en", "deleted": False, "review_result": True, "synthetic": False, "tree_state": "ready_for_export"}
    return row | more


# u1 -> a1 (rank 1), a0 (rank 0) -> u2 -> b0, b2 and b1 (ranked), b3 (unranked), deleted b4
FLAT = [
    node("u1", None, "prompter", "U1"),
    node("a1", "u1", "assistant", "A1", 1),
    node("a0", "u1", "assistant", "A0", 0),
    node("u2", "a0", "prompter", "U2"),
    node("b0", "u2", "assistant", "B0", 0),
    node("b2", "u2", "assistant", "B2", 2),
    node("b1", "u2", "assistant", "B1", 1),
    node("b3", "u2", "assistant", "B3"),
    node("b4", "u2", "assistant", "B4", 3, deleted=True),
    node("u3", "b4", "prompter", "behind a deleted message"),
]
DEEP = [user("U1"), assistant("A0"), user("U2")]
OASST_PAIRS = [
    ([user("U1")], "A0", "A1"),
    (DEEP, "B0", "B1"),
    (DEEP, "B0", "B2"),
    (DEEP, "B1", "B2"),
]


def nested(rows, parent=None, top=True):
    found = [{**row, "replies": nested(rows, row["message_id"], False)} for row in rows if row["parent_id"] == parent]
    return (
        [{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root} for root in found] if top else found
    )


def pairs(records):
    return sorted((r.prompt, r.chosen[0]["content"], r.rejected[0]["content"]) for r in records if len(r.chosen) == 1)


def test_oasst_flat_and_nested(tmp_path, hub):
    hub("OpenAssistant/oasst1", FLAT, OASST)
    flat, tally = load_records("OpenAssistant/oasst1", PAIRS)
    tree, _ = load_records(jsonl(tmp_path / "t.jsonl", nested(FLAT)), PAIRS)
    key = lambda item: (len(item[0]), item[1:])  # noqa: E731
    assert sorted(((r.prompt, r.chosen[0]["content"], r.rejected[0]["content"]) for r in flat), key=key) == OASST_PAIRS
    assert [r[4:11] for r in tree] == [r[4:11] for r in flat]
    assert flat[0].columns["chosen_rank"] == 0 and flat[0].columns["rejected_id"] == "a1"
    assert {r.origin for r in flat} == {("OpenAssistant/oasst1[train]", 1)}, "pairs of one tree share their origin"
    assert tally.read == 10 and tally.kept == 4 and tally.dropped == {"message deleted or failed review": 1}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_oasst_for_sft_and_ppo(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", FLAT)
    answers = [(r.prompt, r.completion) for r in load_records(path, COMPLETIONS)[0]]
    assert answers == [([user("U1")], [assistant("A0")]), (DEEP, [assistant("B0")])]
    assert [r.prompt for r in load_records(path, PROMPTS)[0]] == [[user("U1")], DEEP]


def test_oasst_in_any_order_and_broken(tmp_path):
    mixed = [FLAT[i] for i in (7, 3, 0, 9, 5, 1, 8, 2, 4, 6)]
    straight, _ = load_records(jsonl(tmp_path / "a.jsonl", FLAT), PAIRS)
    shuffled, _ = load_records(jsonl(tmp_path / "b.jsonl", mixed), PAIRS)
    contents = lambda records: {(str(r.prompt), str(r.chosen), str(r.rejected)) for r in records}  # noqa: E731
    assert contents(straight) == contents(shuffled)
    _, tally = load_records(jsonl(tmp_path / "c.jsonl", [*FLAT, node("x", "gone", "assistant", "X", 0)]), PAIRS)
    assert tally.dropped["reply to a message that is not there"] == 1
    cycle = [node("p", "q", "prompter", "P"), node("q", "p", "assistant", "Q")]
    assert len(load_records(jsonl(tmp_path / "d.jsonl", [*FLAT, *cycle]), PAIRS)[0]) == 4
    with pytest.raises(InputError, match="message a9 with role 'judge'"):
        load_records(jsonl(tmp_path / "e.jsonl", [*FLAT, node("a9", "u2", "judge", "X", 0)]), PAIRS)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"parent_id": []}, "parent_id []"),
        ({"message_id": {}}, "message_id {}"),
        ({"rank": "1"}, "message a0 with rank"),
    ],
)
def test_oasst_of_wrong_types_is_named(tmp_path, more, found):
    rows = [{**row, **more} if row["message_id"] == "a0" else row for row in FLAT]
    with pytest.raises(InputError) as error:
        load_records(jsonl(tmp_path / "t.jsonl", rows), PAIRS)
    assert found in error.value.found and ".jsonl:" in error.value.found


def test_deep_trees_do_not_recurse(tmp_path):
    chain = [node("0", None, "prompter", "0")]
    chain += [node(str(i), str(i - 1), ["prompter", "assistant"][i % 2], str(i), 0) for i in range(1, 1500)]
    chain.append(node("other", "1498", "assistant", "other", 1))
    (record,), _ = load_records(jsonl(tmp_path / "t.jsonl", chain), PAIRS)
    assert len(record.prompt) == 1499 and record.rejected == [assistant("other")]


def test_equal_ranks_make_no_pair(tmp_path):
    rows = [FLAT[0], FLAT[1], node("a2", "u1", "assistant", "A2", 1), FLAT[2]]
    records, _ = load_records(jsonl(tmp_path / "t.jsonl", rows), PAIRS)
    assert pairs(records) == [([user("U1")], "A0", "A1"), ([user("U1")], "A0", "A2")]


def test_wrong_presets(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": "T"}])
    with pytest.raises(InputError) as error:
        load_records({"path": path, "preset": "oasst"}, PAIRS)
    assert error.value.found == "preset 'oasst'" and '"preset": "oasst1"' in error.value.fix
    with pytest.raises(InputError) as error:
        load_records({"path": path, "preset": "oasst1"}, PAIRS)
    assert (
        error.value.found == f"{path}: columns text" and "preset oasst1: message_id, parent_id" in error.value.expected
    )


def test_a_mapping_of_ones_own_comes_before_a_schema_seen_by_its_columns(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", FLAT)
    records, _ = load_records({"path": path, "columns": {"text": "text"}}, COMPLETIONS)
    assert [r.text for r in records][:2] == ["U1", "A1"]
