"""The real sets are read as their provenance counts them."""

import pytest

from jaxalign.data.dialogues import parse_dialogue, render_plain
from jaxalign.data.files import read_file
from jaxalign.data.mixture import load_records
from jaxalign.registry import ALGORITHMS, COMPLETIONS, PROMPTS


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data"


def load(path, purpose, **source):
    return load_records({"path": str(path), **source}, ALGORITHMS[purpose].reads)


def test_hh_rlhf(data):
    records, tally = load(data / "hh-rlhf", "dpo")
    assert tally.read == 8552
    # One more pair differs by a last turn of the human alone; 11 have an empty answer.
    assert tally.dropped == {
        "chosen equal to rejected": 36,
        "chosen and rejected differ only behind the last answer": 1,
        "empty completion": 11,
    }
    assert tally.kept == len(records) == 8504
    early = [r for r in records if len(r.chosen) > 1 or len(r.rejected) > 1]
    assert len(early) == 17, "pairs that differ before the last turn"
    assert all(r.prompt[-1]["role"] == "user" for r in records)
    assert all(r.chosen[0] != r.rejected[0] and r.chosen[0]["role"] == "assistant" for r in records)


def test_hh_rlhf_for_sft_and_ppo(data):
    path = data / "hh-rlhf" / "helpful-base.test.jsonl.gz"
    sft, tally = load(path, "sft")
    assert len(sft) + sum(tally.dropped.values()) == tally.read == 2354
    assert all(r.completion[-1]["role"] == "assistant" and r.prompt[-1]["role"] == "user" for r in sft)
    assert len(load(path, "ppo")[0]) == 2354


def test_hh_rlhf_renders_back_to_its_own_text(data):
    for raw in read_file(str(data / "hh-rlhf" / "harmless-base.test.jsonl.gz")):
        for text in raw.row.values():
            assert render_plain(parse_dialogue(text)) == text


@pytest.mark.parametrize("name", ["en_100_tree.jsonl", "en_100_message.jsonl"])
def test_oasst(data, name):
    records, tally = load(data / "oasst-sample" / name, "dpo")
    assert len(records) == 754 and tally.read == 100
    assert all(r.columns["chosen_rank"] < r.columns["rejected_rank"] for r in records)
    assert max(len(r.prompt) for r in records) >= 3, "prompts of several turns"
    roles = {tuple(m["role"] for m in r.prompt) for r in records}
    assert all(r == ("user", "assistant") * (len(r) // 2) + ("user",) for r in roles)


def test_oasst_forms_agree(data):
    tree, message = (load(data / "oasst-sample" / f"en_100_{n}.jsonl", "dpo")[0] for n in ("tree", "message"))
    assert [(r.prompt, r.chosen, r.rejected) for r in tree] == [(r.prompt, r.chosen, r.rejected) for r in message]


@pytest.mark.parametrize(
    ("name", "purpose", "columns", "kind", "count", "dropped"),
    [
        ("llamafactory-demo/dpo_en_demo.json", "dpo", {}, "pair", 300, {}),
        ("llamafactory-demo/kto_en_demo.json", "sft", {}, "messages", 150, {"labelled false": 150}),
        ("llamafactory-demo/kto_en_demo.json", "ppo", {}, "prompt", 300, {}),
        ("llamafactory-demo/alpaca_en_demo.json", "sft", {}, "completion", 999, {}),
        ("llamafactory-demo/glaive_toolcall_en_demo.json", "sft", {}, "messages", 300, {}),
        ("llamafactory-demo/identity.json", "sft", {}, "completion", 91, {}),
        ("llamafactory-demo/v1_sft_demo.jsonl", "sft", {}, "messages", 500, {}),
        ("llamafactory-demo/c4_demo.jsonl", "sft", {}, "text", 300, {}),
        (
            "llamafactory-demo/v1_dpo_demo.jsonl",
            "dpo",
            {"chosen": "chosen_messages", "rejected": "rejected_messages"},
            "pair",
            10,
            {},
        ),
        (
            "rasbt-preference/instruction-data-with-preference.json",
            "dpo",
            {},
            "pair",
            1094,
            {"chosen equal to rejected": 6},
        ),
        ("rasbt-preference/instruction-data.json", "sft", {}, "completion", 1100, {}),
        ("gsm8k", "sft", {"prompt": "question", "completion": "answer"}, "completion", 7473, {}),
        ("gsm8k/test.jsonl", "ppo", {"prompt": "question"}, "prompt", 1319, {}),
        ("ifeval", "ppo", {}, "prompt", 541, {}),
        ("tinystories-sample/stories.jsonl", "sft", {}, "text", 968, {}),
        ("alpaca-9k-dolly-3k", "sft", {}, "completion", 17522, {"empty completion": 8}),
        (
            "alpaca_eval-gpt4-pairs",
            "reward",
            {
                "prompt": "instruction",
                "chosen": "output_1",
                "rejected": "output_2",
                "preference": {"column": "preference", "first": 1, "second": 2, "tie": [0, 1.5]},
            },
            "pair",
            11155,
            {"no preference between the sides": 111, "empty completion": 4},
        ),
    ],
)
def test_counts(data, name, purpose, columns, kind, count, dropped):
    records, tally = load(data / name, purpose, columns=columns)
    assert len(records) == count and tally.dropped == dropped and tally.read == count + sum(dropped.values())
    assert {r.form for r in records} == {kind}


def test_imdb_is_split_and_keeps_its_labels(data):
    records, _ = load_records({"path": str(data / "imdb"), "split": "test"}, PROMPTS, max_records=2000)
    assert len(records) == 2000 and records[0].source.endswith("test.jsonl.gz")
    assert set(records[0].columns) == {"id", "label", "rating"} and isinstance(records[0].prompt, str)
    assert load_records(str(data / "imdb"), COMPLETIONS, max_records=1)[0][0].source.endswith("train.jsonl.gz")


def test_gsm8k_answers_reach_reward_functions(data):
    records, _ = load(data / "gsm8k" / "test.jsonl", "ppo", columns={"prompt": "question"})
    assert all("####" in r.columns["answer"] for r in records)


def test_tools_stay_beside_the_dialogue(data):
    records, _ = load(data / "llamafactory-demo" / "glaive_toolcall_en_demo.json", "sft")
    assert all(set(r.columns) == {"tools"} for r in records)
    assert {m["role"] for r in records for m in r.messages} == {"user", "assistant", "tool"}
