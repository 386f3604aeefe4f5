"""What is wrong is said once and clearly: found, expected, the config line that fixes it."""

import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.config import defaults
from jaxalign.data.mixture import load_records
from jaxalign.errors import InputError
from jaxalign.pipeline.overrides import override
from jaxalign.registry import ALGORITHMS, COMPLETIONS, PAIRS


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def fails(tmp_path):
    def run(rows, purpose, **source):
        path = write(tmp_path / "x.jsonl", rows)
        with pytest.raises(InputError) as error:
            load_records({"path": path, **source}, ALGORITHMS[purpose].reads)
        found = error.value.found.replace(path, "x.jsonl")
        return found, error.value.expected, error.value.fix.replace(path, "x.jsonl")

    return run


def test_wrong_column(fails):
    found, expected, fix = fails(
        [{"question": "Q", "answer": "A"}], "sft", columns={"prompt": "qestion", "completion": "answer"}
    )
    assert found == "x.jsonl: no column 'qestion'"
    assert expected == "one of its columns: question, answer"
    assert fix == 'data.sources=({"path": "x.jsonl", "columns": {"prompt": "question", "completion": "answer"}},)'


def test_wrong_name_of_ours(fails):
    found, expected, fix = fails([{"question": "Q"}], "ppo", columns={"promt": "question"})
    assert found == "columns maps 'promt'" and "prompt, completion, chosen" in expected
    assert fix == 'data.sources=({"path": "x.jsonl", "columns": {"prompt": "question"}},)'


def test_mapping_without_effect(fails):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", "answer": "C"}]
    found, _, fix = fails(rows, "dpo", columns={"chosen": "chosen", "output": "answer"})
    assert "columns maps 'output'" in found and '"columns": {"chosen": "chosen"}' in fix


@pytest.mark.parametrize(
    ("row", "purpose", "columns"),
    [
        ({"question": "Q", "answer": "A"}, "sft", {"prompt": "question", "completion": "answer"}),
        ({"question": "Q", "answer": "A"}, "ppo", {"prompt": "question"}),
        ({"Query": "Q", "Response": "A", "id": 3}, "sft", {"prompt": "Query", "completion": "Response"}),
        (
            {"question": "Q", "chosen_answer": "A", "rejected_answer": "B"},
            "dpo",
            {"prompt": "question", "chosen": "chosen_answer", "rejected": "rejected_answer"},
        ),
        (
            {"chosen_messages": [], "rejected_messages": []},
            "dpo",
            {"chosen": "chosen_messages", "rejected": "rejected_messages"},
        ),
        ({"mesages": [{"role": "user", "content": "Q"}], "id": "x"}, "sft", {"messages": "mesages"}),
        ({"txt": "T", "n": 3}, "sft", {"text": "txt"}),
        ({"qery": "Q", "n": 3}, "ppo", {"prompt": "qery"}),
    ],
)
def test_columns_of_no_form_are_guessed(fails, row, purpose, columns):
    found, expected, fix = fails([row], purpose)
    assert found == f"x.jsonl: columns {', '.join(row)}"
    assert "chosen + rejected" in expected
    assert fix == f'data.sources=({{"path": "x.jsonl", "columns": {json.dumps(columns)}}},)'


@pytest.mark.parametrize("purpose", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("name", "guess"),
    [("promt", "promt"), ("question", "question"), ("what_was_said", "what_was_said"), (None, "COLUMN")],
)
def test_pairs_whose_prompt_nobody_named(fails, name, guess, purpose):
    row = {"chosen": "A", "rejected": "B", "id": 3} | ({name: "Q"} if name else {})
    found, expected, fix = fails([row] * 3, purpose)
    assert found == f"x.jsonl: columns {', '.join(row)}, none of them a prompt"
    assert expected.startswith("prompt + chosen + rejected, or whole dialogues (\\n\\nHuman: ...")
    assert fix == f'data.sources=({{"path": "x.jsonl", "columns": {{"prompt": "{guess}"}}}},)'


@pytest.mark.parametrize("purpose", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "dialogues"),
        ({"prompt": "Q", "completion": "A"}, "prompts with one completion each"),
        ({"text": "T"}, "plain text"),
        ({"prompt": "Q"}, "prompts only"),
    ],
)
def test_data_for_another_algorithm(fails, row, what, purpose):
    found, expected, fix = fails([row], purpose)
    assert found == f"x.jsonl: {what} (columns {', '.join(row)})"
    assert expected == "pairs: chosen + rejected"
    assert fix.startswith('data.sources=({"path": "PAIRS.jsonl"},) with chosen and rejected in it')
    assert ('defaults("sft")' in fix) == (what != "prompts only")


def test_kto_data_for_dpo(fails):
    found, *_ = fails([{"prompt": "Q", "completion": "A", "label": True}], "dpo")
    assert "each labelled true or false (unpaired feedback, the form of KTO)" in found


def test_prompts_for_sft(fails):
    found, expected, fix = fails([{"prompt": "Q", "reply": "A"}], "sft")
    assert found == "x.jsonl: prompts only (columns prompt, reply)"
    assert expected.startswith("completions to train on: chosen + rejected; messages; prompt + completion;")
    assert fix == 'data.sources=({"path": "x.jsonl", "columns": {"completion": "reply"}},)'


GOOD_PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("good", "bad", "purpose", "found"),
    [
        (GOOD_PAIR, {"prompt": "Q", "chosen": "A"}, "dpo", "no 'rejected', only prompt, chosen"),
        (GOOD_PAIR, {**GOOD_PAIR, "prompt": 5}, "dpo", "prompt is the number 5, not a string or a list of messages"),
        (GOOD_PAIR, {**GOOD_PAIR, "chosen": True}, "dpo", "chosen is true, not a string or a list of messages"),
        (GOOD_PAIR, {**GOOD_PAIR, "chosen": ["A"]}, "dpo", "chosen: message 1 is the string 'A', not an object"),
        (
            GOOD_PAIR,
            {**GOOD_PAIR, "chosen": [{"role": "assistant", "content": "A"}]},
            "dpo",
            "one of chosen and rejected is a string, the other a list of messages",
        ),
        ({"text": "T"}, {"text": ["T"]}, "sft", "text is a list of 1, not a string"),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            {"messages": [{"role": "wizard", "content": "Q"}]},
            "sft",
            "message 1 has the role 'wizard'; known are",
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            {"messages": "Q"},
            "sft",
            "the string 'Q' where a list of messages is due",
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
            {"prompt": [{"role": "assistant", "content": "Q"}], "completion": "A"},
            "sft",
            "prompt ends with a turn of assistant, not of the user",
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
            {"prompt": "Q", "completion": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "A"}]},
            "sft",
            "completion begins with a turn of user, not of the assistant",
        ),
        (
            {"instruction": "Q", "output": "A", "history": []},
            {"instruction": "Q", "output": "A", "history": [["Q"]]},
            "sft",
            "history holds a list of 1, not pairs of strings",
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            {"chosen": "A", "rejected": "B"},
            "dpo",
            "no prompt, and no dialogues",
        ),
        (
            GOOD_PAIR,
            {
                "prompt": "other",
                "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
                "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
            },
            "dpo",
            "chosen and rejected are whole dialogues, and prompt is none of their turns",
        ),
        ({**GOOD_PAIR, "margin": 1}, {**GOOD_PAIR, "margin": float("nan")}, "dpo", "score is nan"),
    ],
)
def test_bad_records_are_named_with_their_line(fails, good, bad, purpose, found):
    got, expected, fix = fails([good, good, bad], purpose)
    assert got.startswith(f"x.jsonl:3: {found}")
    assert expected and fix.startswith("repair or delete that record")


def test_wrong_numbers(fails):
    row = {**GOOD_PAIR, "w": -1, "s": "high"}
    assert fails([row], "dpo", columns={"weight": "w"})[0] == "x.jsonl:1: weight is -1, less than 0"
    assert fails([row], "dpo", columns={"score": "s"})[0] == "x.jsonl:1: score is the string 'high', not a number"
    for row in ({**GOOD_PAIR, "w": 1e39}, {**GOOD_PAIR, "w": -1e300}):  # infinite in float32
        assert fails([row], "dpo", columns={"weight": "w"})[0].startswith("x.jsonl:1: weight is ")


def test_nothing_left(fails, tmp_path):
    found, *_ = fails([{"text": ""}, {"text": " "}], "sft")
    assert found == "x.jsonl: 2 records, none usable: 2 empty text (first at x.jsonl:1)"
    found, *_ = fails([], "sft")
    assert found == "x.jsonl: no records in it"
    found, *_ = fails([{}], "sft")
    assert found == "x.jsonl: columns (none)"


def test_what_to_do_with_a_file_that_gives_nothing(fails):
    assert fails([], "sft")[2] == 'write records into x.jsonl, such as {"prompt": "...", "completion": "..."}'
    _, _, fix = fails([{"prompt": "Q", "chosen": "A", "rejected": "A"}] * 3, "dpo")
    assert fix.startswith("repair the records, beginning with x.jsonl:1; ") and '"rejected": "a worse one"' in fix


def test_only_a_close_name_is_offered(tmp_path):
    for name in ("pairs.jsonl", "README.md", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "more").mkdir()

    def missing(name):
        with pytest.raises(InputError) as error:
            load_records(str(tmp_path / name), PAIRS)
        return error.value

    assert f'"{tmp_path}/pairs.jsonl"' in missing("pair.json").fix
    far = missing("nothing.jsonl")
    assert "pairs.jsonl" not in far.fix and f'"{tmp_path}/FILE"' in far.fix
    assert far.expected.endswith(f"data in {tmp_path}: more/, pairs.jsonl")


def test_a_flag_for_the_command_line_where_a_configuration_is_at_hand(tmp_path, fails):
    path = write(tmp_path / "it's.jsonl", [{"question": "Q", "answer": "A"}])
    with pytest.raises(InputError) as error:
        load_records(path, COMPLETIONS, field="data.sources")
    flag = error.value.fix.split("(as a flag: ", 1)[1].removesuffix(")")
    (word,) = shlex.split(flag)
    field, text = word.removeprefix("--config.").split("=", 1)
    config = defaults("sft")
    override(config, field, text)
    assert config.data.sources == ({"path": path, "columns": {"prompt": "question", "completion": "answer"}},)
    assert "flag" not in fails([{"question": "Q", "answer": "A"}], "sft")[2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "It was a dark and stor', 'the line ends inside a string: ...{"text": "It was a dark and stor'),
        ('{"text": "T", "more": [1, 2', "the line ends before its object does: ..."),
        ('{"text": T}', "not JSON (Expecting value"),
    ],
)
def test_a_line_that_was_cut_off(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "T"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        load_records(str(path), COMPLETIONS)
    assert error.value.found.startswith(f"{path}:2: {words}")


def test_the_field_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        load_records(str(tmp_path / "no.jsonl"), COMPLETIONS, field="data.eval_sources")
    assert error.value.fix.startswith("data.eval_sources=(")


KEYS = ["text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "input"]
KEYS += ["output", "system", "history", "label", "margin", "score", "message_id", "parent_id", "role", "replies"]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "gpt", "x", None])},
    optional={"content": st.text() | st.none()},
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(MESSAGE, max_size=4) | MESSAGE,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6), min_size=1, max_size=3),
    purpose=st.sampled_from((None, *ALGORITHMS)),
)
def test_any_rows_give_sound_records_or_one_clear_error(tmp_path_factory, rows, purpose):
    path = write(tmp_path_factory.mktemp("any") / "x.jsonl", rows)
    try:
        records, tally = load_records(path, purpose and ALGORITHMS[purpose].reads)
    except InputError as error:
        assert error.found and error.expected and error.fix
        return
    assert tally.kept == len(records) == tally.used
    assert tally.kept + sum(tally.dropped.values()) == tally.read or "message_id" in str(rows)
    for index, record in enumerate(records):
        assert record.index == index
        contents = [record.text, record.messages, record.prompt, record.completion, record.chosen, record.rejected]
        contents = [content for content in contents if content is not None]
        assert contents
        for content in contents:
            for text in [content] if isinstance(content, str) else [m["content"] for m in content]:
                text.encode()
        if isinstance(record.prompt, list) and record.form == "prompt":
            assert record.prompt[-1]["role"] in ("user", "tool", "system")
        if record.form == "pair":
            assert record.chosen != record.rejected


def test_a_number_too_large_for_a_float_is_told(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "Q", "completion": "A", "weight": 10**400}] * 2)
    with pytest.raises(InputError, match=r"x\.jsonl:1: weight is the number 10+\.\.\.") as error:
        load_records({"path": path, "columns": {"weight": "weight"}}, COMPLETIONS)
    assert len(str(error.value)) < 600
    margins = write(tmp_path / "y.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 10**400}])
    with pytest.raises(InputError):
        load_records({"path": margins, "columns": {"score": "margin"}}, PAIRS)


def test_a_folder_whose_card_is_no_yaml_is_told(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    write(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=str(tmp_path)):
        load_records({"path": str(tmp_path)}, COMPLETIONS)


@pytest.mark.parametrize(
    "header,mark", [("prompt^chosen^rejected", "^"), ("prompt|chosen, better|rejected", "|"), ("a\x01b", "\x01")]
)
def test_a_csv_with_another_delimiter_is_told_which(tmp_path, header, mark):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n{header}\n")
    with pytest.raises(InputError) as error:
        load_records(str(path), PAIRS)
    assert repr(mark) in error.value.found and "python -c" in error.value.fix
    subprocess.run(["bash", "-c", error.value.fix.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    assert mark not in (tmp_path / "NEW.csv").read_text()
