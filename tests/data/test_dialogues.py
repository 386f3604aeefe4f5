"""Dialogues: parsing, rendering, roles, and where a pair of dialogues parts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.dialogues import (
    as_messages,
    is_dialogue,
    parse_dialogue,
    render_plain,
    split_pair,
    until_answer,
    until_request,
)


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def test_parse_keeps_white_space_beyond_the_form():
    text = "\n\nHuman:  two\n\nAssistant: \n\nHuman: x\ny \n\nAssistant: end\n"
    assert parse_dialogue(text) == [user(" two"), assistant(""), user("x\ny "), assistant("end\n")]
    assert render_plain(parse_dialogue(text)) == text


def test_parse_other_openings():
    said = [user("Hi"), assistant("Yes")]
    assert parse_dialogue("Human: Hi\n\nAssistant: Yes") == said
    assert parse_dialogue(" \n\nHuman: Hi\n\nAssistant: Yes") == said
    assert parse_dialogue("\r\n\r\nHuman: Hi\r\n\r\nAssistant: Yes") == said
    assert parse_dialogue("Be kind.\n\nHuman: Hi\n\nAssistant: Yes") == [system("Be kind."), *said]
    assert render_plain([system("Be kind."), *said]) == "Be kind.\n\nHuman: Hi\n\nAssistant: Yes"


@pytest.mark.parametrize(
    "text", ["", "Human: Hi", "\n\nAssistant: a\n\nHuman: b", "A Human: x\n\nAssistant: y", "Human: a\nAssistant: b"]
)
def test_what_is_no_dialogue(text):
    assert not is_dialogue(text)


WORDS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(
    lambda t: "Human:" not in t and "Assistant:" not in t and "\r" not in t
)


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_rendering_and_parsing_are_inverse(turns):
    messages = [message for u, a in turns for message in (user(u), assistant(a))]
    text = render_plain(messages)
    assert parse_dialogue(text) == messages
    assert is_dialogue(text)


@settings(max_examples=80, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS), min_size=1, max_size=5),
    head=st.none() | WORDS,
    given=st.none() | WORDS,
)
def test_a_prompt_is_a_prefix_of_what_follows(turns, head, given):
    messages = [{"role": role, "content": text} for role, text in turns]
    messages = ([system(head)] if head is not None else []) + messages
    if given is not None and messages[0]["role"] == "user":
        messages[0] = user(f"{messages[0]['content']}\n{given}", input=given)
    whole = render_plain(messages)
    for i, message in enumerate(messages):
        assert i == 0 or whole.startswith(render_plain(messages[:i]))
        if message["role"] == "assistant" and i:
            assert whole.startswith(render_plain(messages[:i], add_generation_prompt=True))


def test_alpaca_framing_is_stanfords():
    messages = [user("Edit.\nHe go", input="He go")]
    assert render_plain([*messages, assistant("He goes")]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nEdit.\n\n### Input:\nHe go\n\n### Response:\nHe goes"
    )
    assert render_plain([user("Sing.", input="")], True) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )
    assert render_plain([system("Be brief."), user("Sing.", input="")]) == "Be brief.\n\n### Instruction:\nSing."
    long = render_plain([user("A", input=""), assistant("B"), user("C\nI", input="I"), assistant("D")])
    assert long.endswith(
        "request.\n\n### Instruction:\nA\n\n### Response:\nB\n\n"
        "### Instruction:\nC\n\n### Input:\nI\n\n### Response:\nD"
    )


def test_messages_in_every_shape():
    expected = [system("S"), user("U"), assistant("A")]
    roles = [("system", "system"), ("human", "user"), ("gpt", "assistant")]
    assert as_messages([{"from": a, "value": c} for (a, _), c in zip(roles, "SUA")]) == expected
    assert as_messages([{"role": b, "content": c, "name": None} for (_, b), c in zip(roles, "SUA")]) == expected
    assert (
        as_messages([{"role": b, "content": [{"type": "text", "text": c}]} for (_, b), c in zip(roles, "SUA")])
        == expected
    )
    assert (
        as_messages([{"role": b, "content": [{"type": "text", "value": c}]} for (_, b), c in zip(roles, "SUA")])
        == expected
    )
    assert as_messages({"role": ["system", "user", "assistant"], "content": list("SUA")}) == expected
    assert as_messages({"from": "gpt", "value": "A"}) == [assistant("A")]
    assert as_messages([{"role": " User ", "text": "U"}]) == [user("U")]
    assert as_messages([{"role": "prompter", "content": "a"}, {"role": "observation", "content": "b"}]) == [
        user("a"),
        {"role": "tool", "content": "b"},
    ]


def test_messages_keep_what_templates_read():
    calls = [{"function": {"name": "f"}}]
    assert as_messages([{"role": "assistant", "content": None, "tool_calls": calls}]) == [
        assistant("", tool_calls=calls)
    ]
    assert as_messages([{"role": "assistant", "content": "x", "loss_weight": 0.0}]) == [assistant("x", weight=0)]
    assert as_messages([{"role": "assistant", "content": "x", "weight": 1}]) == [assistant("x")]
    assert as_messages([{"role": "user", "content": "x", "loss_weight": 0.0}]) == [user("x", weight=0)]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "the number 3 where a list of messages is due"),
        ("Hi", "the string 'Hi' where a list of messages is due"),
        (["Hi"], "message 1 is the string 'Hi', not an object with role and content"),
        ([user("a"), {"role": "alien", "content": "b"}], "message 2 has the role 'alien'; known are assistant"),
        ([{"content": "b"}], "message 1 has the role None"),
        ([{"role": 3, "content": "b"}], "message 1 has the role 3"),
        ([{"role": "user", "content": None}], "message 1 has null for content, not a string"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 has an object with a for content"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 has a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part of type 'text'"),
        ({"role": ["user"], "content": ["a", "b"]}, "lists of roles and contents of different lengths"),
    ],
)
def test_wrong_messages(value, problem):
    with pytest.raises(ValueError) as error:
        as_messages(value)
    assert str(error.value).startswith(problem)


def test_pair_parts_at_a_turn():
    prompt = [system("S"), user("A"), assistant("B"), user("C")]
    one, other = [assistant("D"), user("E"), assistant("F")], [assistant("G")]
    assert split_pair(prompt + one, prompt + other) == (prompt, one, other)


def test_trap_pair_that_parts_in_a_user_turn_keeps_shared_answers_in_the_prompt():
    shared = [user("A"), assistant("B")]
    one, other = [user("C"), assistant("D")], [user("E"), assistant("F")]
    assert split_pair(shared + one, shared + other) == (shared, one, other)


def test_turns_behind_the_last_answer_are_left_out():
    assert split_pair([user("A"), assistant("B"), user("C")], [user("A"), assistant("D")])[1] == [assistant("B")]
    assert until_answer([user("A")]) == [] and until_request([assistant("A")]) == []
    assert until_request([user("A"), assistant("B")]) == [user("A")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("A"), assistant("B")], [user("A"), assistant("B")], "chosen equal to rejected"),
        ([user("A"), assistant("B")], [user("A"), assistant("B"), user("C")], "chosen and rejected differ only behind"),
        ([user("A"), assistant("B")], [user("Z"), assistant("C")], "chosen and rejected answer different prompts"),
        (
            [system("S"), user("A"), assistant("B")],
            [system("S"), user("Z"), assistant("B")],
            "chosen and rejected answer",
        ),
        ([user("A")], [user("A"), assistant("B")], "no assistant turn"),
        (
            [user("A"), assistant("B")],
            [user("A"), assistant("B"), user("C"), assistant("D")],
            "one side is the beginning",
        ),
    ],
)
def test_what_is_no_pair(chosen, rejected, reason):
    with pytest.raises(ValueError, match=reason):
        split_pair(chosen, rejected)


TURNS = st.lists(st.sampled_from([user("a"), user("b"), assistant("a"), assistant("b"), system("s")]), max_size=5)


@settings(max_examples=150, deadline=None)
@given(chosen=TURNS, rejected=TURNS)
def test_split_pair_loses_nothing(chosen, rejected):
    try:
        prompt, one, other = split_pair(chosen, rejected)
    except ValueError:
        return
    assert prompt + one == until_answer(chosen) and prompt + other == until_answer(rejected)
    assert one[0] != other[0]
    assert one[-1]["role"] == other[-1]["role"] == "assistant"
    assert split_pair(rejected, chosen) == (prompt, other, one)
