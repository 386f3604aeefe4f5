"""Rows of every form become records; every algorithm takes of them what it needs."""

import json

import pytest

from jaxalign.data.mixture import load_records
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS, COMPLETIONS


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def load(tmp_path):
    """Records and tally of given rows."""

    def run(rows, purpose=None, **source):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_records({"path": str(path), **source}, purpose and ALGORITHMS[purpose].reads)

    return run


def fields(record):
    """The fields of a record that hold something."""
    names = ("form", "text", "messages", "prompt", "completion", "chosen", "rejected")
    return {name: getattr(record, name) for name in names if getattr(record, name) is not None}


SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
DIALOGUE = [user("Q"), assistant("A")]
HH = "\n\nHuman: Q\n\nAssistant: {}"

# name -> row, what it is as it is, for sft, for ppo
FORMS = {
    "text": ({"text": "T"}, {"form": "text", "text": "T"}, {"form": "text", "text": "T"}, "T"),
    "messages": (
        {"messages": DIALOGUE},
        {"form": "messages", "messages": DIALOGUE},
        {"form": "messages", "messages": DIALOGUE},
        [user("Q")],
    ),
    "messages of one turn": (
        {"messages": [user("Q")]},
        {"form": "messages", "messages": [user("Q")]},
        "no assistant turn",
        [user("Q")],
    ),
    "sharegpt": (
        {"conversations": SHAREGPT, "system": "S"},
        {"form": "messages", "messages": [system("S"), *DIALOGUE]},
        {"form": "messages", "messages": [system("S"), *DIALOGUE]},
        [system("S"), user("Q")],
    ),
    "sharegpt ranking": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}},
        {"form": "pair", "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        [user("Q")],
    ),
    "alpaca": (
        {"instruction": "Q", "input": "I", "output": "A", "history": [["P", "O"]], "system": "S"},
        {
            "form": "completion",
            "prompt": [system("S"), user("P", input=""), assistant("O"), user("Q\nI", input="I")],
            "completion": [assistant("A")],
        },
        {
            "form": "completion",
            "prompt": [system("S"), user("P", input=""), assistant("O"), user("Q\nI", input="I")],
            "completion": [assistant("A")],
        },
        [system("S"), user("P", input=""), assistant("O"), user("Q\nI", input="I")],
    ),
    "alpaca without input": (
        {"instruction": "Q", "input": " ", "output": "A"},
        {"form": "completion", "prompt": [user("Q", input="")], "completion": [assistant("A")]},
        {"form": "completion", "prompt": [user("Q", input="")], "completion": [assistant("A")]},
        [user("Q", input="")],
    ),
    "alpaca pair": (
        {"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"},
        {"form": "pair", "prompt": [user("Q", input="")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "completion", "prompt": [user("Q", input="")], "completion": [assistant("A")]},
        [user("Q", input="")],
    ),
    "completion": (
        {"prompt": "Q", "completion": "A"},
        {"form": "completion", "prompt": "Q", "completion": "A"},
        {"form": "completion", "prompt": "Q", "completion": "A"},
        "Q",
    ),
    "completion without prompt": (
        {"prompt": "", "completion": "A"},
        {"form": "completion", "prompt": "", "completion": "A"},
        {"form": "completion", "prompt": "", "completion": "A"},
        None,
    ),
    "completion of messages": (
        {"prompt": [user("Q")], "completion": [assistant("A")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        [user("Q")],
    ),
    "completion half of messages": (
        {"prompt": "Q", "completion": [assistant("A")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        "Q",
    ),
    "completion with a system message": (
        {"system": "S", "prompt": "Q", "completion": "A"},
        {"form": "completion", "prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
        {"form": "completion", "prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
        [system("S"), user("Q")],
    ),
    "pair": (
        {"prompt": "Q", "chosen": " A", "rejected": " B"},
        {"form": "pair", "prompt": "Q", "chosen": " A", "rejected": " B"},
        {"form": "completion", "prompt": "Q", "completion": " A"},
        "Q",
    ),
    "pair of messages": (
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "pair", "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        [user("Q")],
    ),
    "pair of dialogues, prompt beside": (
        {"prompt": "Q ", "chosen": DIALOGUE, "rejected": [user("Q"), assistant("B")], "messages": DIALOGUE},
        {"form": "pair", "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        [user("Q")],
    ),
    "pair of dialogues": (
        {"chosen": [*DIALOGUE, user("R"), assistant("C")], "rejected": [*DIALOGUE, user("R"), assistant("D")]},
        {"form": "pair", "prompt": [*DIALOGUE, user("R")], "chosen": [assistant("C")], "rejected": [assistant("D")]},
        {"form": "completion", "prompt": [*DIALOGUE, user("R")], "completion": [assistant("C")]},
        [*DIALOGUE, user("R")],
    ),
    "pair of dialogues that part early": (
        {"chosen": [*DIALOGUE, user("R"), assistant("C")], "rejected": [user("Q"), assistant("B")]},
        {
            "form": "pair",
            "prompt": [user("Q")],
            "chosen": [assistant("A"), user("R"), assistant("C")],
            "rejected": [assistant("B")],
        },
        {"form": "completion", "prompt": [*DIALOGUE, user("R")], "completion": [assistant("C")]},
        [*DIALOGUE, user("R")],
    ),
    "hh": (
        {"chosen": HH.format("A"), "rejected": HH.format("B")},
        {"form": "pair", "prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"form": "completion", "prompt": [user("Q")], "completion": [assistant("A")]},
        [user("Q")],
    ),
    "equal pair": (
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        "chosen equal to rejected",
        {"form": "completion", "prompt": "Q", "completion": "A"},
        "Q",
    ),
    "empty side": (
        {"prompt": "Q", "chosen": "A", "rejected": " \n"},
        "empty completion",
        {"form": "completion", "prompt": "Q", "completion": "A"},
        "Q",
    ),
    "prompt": ({"prompt": "Q"}, {"form": "prompt", "prompt": "Q"}, None, "Q"),
    "prompt of messages": (
        {"prompt": [user("Q")]},
        {"form": "prompt", "prompt": [user("Q")]},
        None,
        [user("Q")],
    ),
    "instruction": (
        {"instruction": "Q", "input": "I"},
        {"form": "prompt", "prompt": [user("Q\nI", input="I")]},
        None,
        [user("Q\nI", input="I")],
    ),
    "prompt beside text": (
        {"prompt": "Q", "text": "T"},
        {"form": "prompt", "prompt": "Q"},
        {"form": "text", "text": "T"},
        "Q",
    ),
}
KEEP = {  # a second, good row of the same form, so that a dropped row leaves a record
    "equal pair": {"prompt": "Q", "chosen": "x", "rejected": "y"},
    "empty side": {"prompt": "Q", "chosen": "x", "rejected": "y"},
    "messages of one turn": {"messages": DIALOGUE},
    "completion without prompt": {"prompt": "x", "completion": "y"},
}


def check(load, name, purpose, expected):
    row = FORMS[name][0]
    records, tally = load([row, *([KEEP[name]] if name in KEEP else [])], purpose)
    if isinstance(expected, str):
        assert tally.dropped == {expected: 1} and tally.read == 2 and tally.kept == 1
    else:
        assert fields(records[0]) == expected


@pytest.mark.parametrize("name", FORMS)
def test_form(load, name):
    check(load, name, None, FORMS[name][1])


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name][2] is not None])
def test_form_for_sft(load, name):
    check(load, name, "sft", FORMS[name][2])


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name][3] is not None])
def test_form_for_ppo(load, name):
    check(load, name, "ppo", {"form": "prompt", "prompt": FORMS[name][3]})


def test_an_empty_prompt_gives_ppo_nothing(load):
    _, tally = load([{"prompt": "", "completion": "A"}, {"prompt": "x", "completion": "y"}], "ppo")
    assert tally.dropped == {"empty prompt": 1}


@pytest.mark.parametrize("purpose", ["reward", "dpo"])
@pytest.mark.parametrize("name", [name for name in FORMS if isinstance(FORMS[name][1], dict)])
def test_pairs_serve_reward_and_dpo(load, name, purpose):
    row, plain, *_ = FORMS[name]
    if plain["form"] == "pair":
        assert fields(load([row], purpose)[0][0]) == plain


def test_strings_and_messages_are_not_mixed_within_a_record(load):
    for purpose in (None, *ALGORITHMS):
        for name, (row, *_) in FORMS.items():
            if purpose in ("reward", "dpo") and name not in ("pair", "hh", "pair of messages"):
                continue
            if purpose == "sft" and FORMS[name][2] is None:
                continue
            for record in load([row, *([KEEP[name]] if name in KEEP else [])], purpose)[0]:
                content = [record.prompt, record.completion, record.chosen, record.rejected]
                assert len({type(value) for value in content if value is not None}) <= 1


def test_columns_are_renamed(load):
    rows = [{"question": "Q", "good": "A", "bad": "B", "id": 7}]
    mapping = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    (record,), _ = load(rows, "dpo", columns=mapping)
    assert fields(record) == {"form": "pair", "prompt": "Q", "chosen": "A", "rejected": "B"}
    assert record.columns == {"id": 7}


def test_a_mapping_comes_before_the_datas_own_names(load):
    rows = [{"prompt": "wrong", "question": "Q", "chosen": "A", "rejected": "B", "messages": DIALOGUE, "answer": "R"}]
    (record,), _ = load(rows, "dpo", columns={"prompt": "question"})
    assert record.prompt == "Q" and record.columns["prompt"] == "wrong"
    (record,), _ = load(rows, "sft", columns={"prompt": "question", "completion": "answer"})
    assert fields(record) == {"form": "completion", "prompt": "Q", "completion": "R"}
    (record,), _ = load(rows, "sft", columns={"text": "question"})
    assert fields(record) == {"form": "text", "text": "Q"}


def test_instruction_and_output_make_a_dialogue_of_any_two_columns(load):
    (record,), _ = load([{"q": "Q", "a": "A"}], "sft", columns={"instruction": "q", "output": "a"})
    assert record.prompt == [user("Q", input="")] and record.completion == [assistant("A")]


def test_preference_orders_the_sides(load):
    rows = [{"q": "Q", "a": "A", "b": "B", "p": p} for p in (1, 2, 1.0, "2", 0, 1.5, None)]
    codes = {"column": "p", "first": 1, "second": 2, "tie": [0, 1.5]}
    mapping = {"prompt": "q", "chosen": "a", "rejected": "b", "preference": codes}
    records, tally = load(rows, "dpo", columns=mapping)
    assert [record.chosen for record in records] == ["A", "B", "A", "B"]
    assert [record.rejected for record in records] == ["B", "A", "B", "A"]
    assert tally.dropped == {"no preference between the sides": 3}
    assert [record.completion for record in load(rows, "sft", columns=mapping)[0]] == ["A", "B", "A", "B"]
    assert len(load(rows, "ppo", columns=mapping)[0]) == 7


def test_score_and_weight(load):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 1.5, "weight": 9, "stars": "4"}]
    (record,), _ = load(rows, "reward")
    assert (record.score, record.weight, record.columns) == (1.5, 1.0, {"weight": 9, "stars": "4"})
    (record,), _ = load(rows, "reward", columns={"score": "stars", "weight": "weight"})
    assert (record.score, record.weight, record.columns) == (4.0, 9.0, {"margin": 1.5})
    (record,), _ = load([{"text": "T", "label": True}], "sft", columns={"score": "label"})
    assert record.score == 1.0
    (record,), _ = load([{"text": "T", "margin": "wide"}], "sft")
    assert record.score == 0.0 and record.columns == {"margin": "wide"}, "a margin that is no number is just a column"


def test_reward_functions_get_every_column_but_the_prompts(load):
    rows = [{"question": "Q", "answer": "#### 4", "level": {"a": None}, "score": 3}]
    mapping = {"prompt": "question", "completion": "answer"}
    assert load(rows, "ppo", columns=mapping)[0][0].columns == {"answer": "#### 4", "level": {"a": None}, "score": 3}
    assert load(rows, "ppo", columns={"prompt": "question"})[0][0].columns == {
        "answer": "#### 4",
        "level": {"a": None},
        "score": 3,
    }
    assert load(rows, "sft", columns=mapping)[0][0].columns == {"level": {"a": None}, "score": 3}
    assert load([{"messages": DIALOGUE, "id": 1}], "ppo")[0][0].columns == {"id": 1}


def test_fields_of_other_forms_are_just_columns(load):
    row = {"prompt": "Q", "completion": "A", "text": "T", "output": "O", "history": 3}
    assert load([row], "sft")[0][0].columns == {"text": "T", "output": "O", "history": 3}


def test_trap_sft_does_not_train_on_what_is_labelled_false(load):
    rows = [{"messages": DIALOGUE, "label": True}, {"messages": DIALOGUE, "label": False}]
    records, tally = load(rows, "sft")
    assert len(records) == 1 and tally.dropped == {"labelled false": 1}
    assert len(load(rows, "ppo")[0]) == 2
    texts = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    assert len(load(texts, "sft")[0]) == 2, "a label of a text is not a verdict on an answer"


def test_csv_says_the_same_as_json(tmp_path):
    def read(text, purpose):
        (tmp_path / "x.csv").write_text(text)
        return load_records(str(tmp_path / "x.csv"), ALGORITHMS[purpose].reads)

    records, tally = read("prompt,completion,label\nq,good,True\nq,bad,False\nq,unsaid,\n", "sft")
    assert [r.completion for r in records] == ["good", "unsaid"] and tally.dropped == {"labelled false": 1}
    records, _ = read("prompt,chosen,rejected,margin\nq,a,b,0.5\nq,c,b,\n", "dpo")
    assert [r.score for r in records] == [0.5, 0.0]
    (first, second), _ = read('instruction,output,history\nq,a,"[[""Q"",""A""]]"\nq,a,\n', "sft")
    assert first.prompt == [user("Q", input=""), assistant("A"), user("q", input="")]
    assert second.prompt == [user("q", input="")]


def test_a_prompt_column_that_whole_dialogues_repeat_is_not_doubled(load):
    turns = [system("S"), user("Q")]
    whole = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    sides = {"chosen": [assistant("A")], "rejected": [assistant("B")]}
    pair = {"form": "pair", "prompt": [user("Q")], **sides}
    for row, wanted in (
        ({"prompt": turns, **whole}, {**pair, "prompt": turns}),  # the system message stands in the prompt alone
        ({"prompt": [user("Q", name="N")], **whole}, pair),
        ({"prompt": [user("Q")], **{k: [system("S"), *v] for k, v in whole.items()}}, {**pair, "prompt": turns}),
        ({"messages": whole["chosen"], **whole}, pair),  # beside the pair, its better side
        ({"prompt": HH.format(""), "chosen": HH.format("A"), "rejected": HH.format("B")}, pair),
        ({"prompt": "Q", "chosen": HH.format("A"), "rejected": HH.format("B")}, pair),
    ):
        assert fields(load([row], "dpo")[0][0]) == wanted
    texts = {"prompt": "Hello", "chosen": "Hello you", "rejected": "Hello"}
    assert fields(load([texts], "dpo")[0][0]) == {"form": "pair", **texts}, "strings stay as they are"
    with pytest.raises(InputError, match="prompt is not how they begin"):
        load([{"prompt": [user("other")], **whole}], "dpo")


def test_a_column_that_shows_up_late_counts(load):
    talk, plain = {"messages": DIALOGUE}, {"prompt": "Q", "completion": "A"}
    records, _ = load([talk] * 300 + [{**talk, "system": "S"}, talk], "sft")
    assert records[300].messages == [system("S"), *DIALOGUE] and records[301].messages == DIALOGUE
    records, _ = load([{"instruction": "Q", "output": "A"}] * 300 + [{"instruction": "Q", "output": "A", "input": "I"}])
    assert records[300].prompt == [user("Q\nI", input="I")]
    assert load([plain] * 300 + [{**plain, "label": False}], "sft")[1].dropped == {"labelled false": 1}
    records, _ = load([plain] * 300 + [{**plain, "chosen": "C", "rejected": "R"}], "sft")
    assert records[300].columns == {"chosen": "C", "rejected": "R"}, "the columns of another form are just columns"
    with pytest.raises(InputError, match="301: the first 'system' of the file"):
        load([plain] * 300 + [{**plain, "system": "S"}], "sft")


def test_nulls_and_blanks_are_dropped_and_counted(load):
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": None, "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": None},
        {"prompt": None, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "", "rejected": "B"},
        {"prompt": "Q", "chosen": "A\ud83d", "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": "C"},
    ]
    records, tally = load(rows, "dpo")
    assert [record.index for record in records] == [0, 1] and [record.line for record in records] == [1, 8]
    assert tally.dropped == {
        "chosen is null": 1,
        "rejected is null": 1,
        "prompt is null": 1,
        "empty completion": 1,
        "broken unicode (half a surrogate pair)": 1,
        "chosen equal to rejected": 1,
    }
    assert tally.examples["chosen is null"][0].endswith("rows.jsonl:2")
    assert tally.read == 8 and tally.kept == tally.used == 2
    json.dumps(tally.to_dict())


def test_a_column_that_starts_with_nulls_is_still_seen(load):
    rows = [{"prompt": "Q", "chosen": None, "rejected": "B"}] * 3 + [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
    assert len(load(rows, "dpo")[0]) == 1


def test_files_of_a_source_may_differ_in_form(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "T"}\n' * 300)
    (tmp_path / "c.json").write_text('[{"instruction": "Q", "output": "A"}]')
    records, _ = load_records(str(tmp_path), COMPLETIONS)
    assert [record.form for record in records] == ["completion", *["text"] * 300, "completion"]
    assert [record.index for record in records] == list(range(302))
