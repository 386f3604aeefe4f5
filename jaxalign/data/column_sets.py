"""The sets of columns that make a record, and how a row of each reads.

A maker takes a row under our names, without nulls, and returns the fields of a Record.  It raises SkipRow for a row
that holds nothing to train on, and ValueError, saying how, for one that is wrong.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.data.dialogues import (
    as_messages,
    is_dialogue,
    kind_of,
    parse_dialogue,
    split_pair,
    until_answer,
    until_request,
)
from jaxalign.data.records import Content, Message
from jaxalign.registry import Reads

_LARGEST = 1e18  # of a score or weight: its square fits float32


class SkipRow(Exception):
    """A row without a record; its message is the reason that the report counts."""


class ColumnSet(NamedTuple):
    """Columns, under our names, that make a record of one form."""

    form: str  # of the record, one of forms.FORMS
    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[dict[str, Any]], dict[str, Any]]  # the fields of a row -> fields of a Record


def number(row: dict[str, Any], name: str, absent: float) -> float:
    """A number in a row.  Strings of digits are numbers, as in csv; an empty string is none."""
    value = row.get(name, absent)
    if isinstance(value, str) and not value.strip():
        return absent
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {kind_of(value)}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}")
    if abs(number) > _LARGEST:
        raise ValueError(f"{name} is {number:g}, beyond {_LARGEST:g}")
    return number


def truth(value: Any) -> bool | None:
    """A label as true or false, also in words, as in csv; None if it is neither.

    >>> truth(True), truth("False"), truth("positive"), truth(1)
    (True, False, None, None)
    """
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _string(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} is {kind_of(row[name])}, not a string")
    return row[name]


def _content(row: dict[str, Any], name: str) -> Content:
    if isinstance(row[name], str):
        return row[name]
    if not isinstance(row[name], (list, tuple, Mapping)):
        raise ValueError(f"{name} is {kind_of(row[name])}, not a string or a list of messages")
    try:
        return as_messages(row[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def blank(content: Content) -> bool:
    """Whether content is empty: white space, or messages without assistant text or tool calls."""
    if isinstance(content, str):
        return not content.strip()
    said = [m for m in content if m["role"] == "assistant" and m.get("weight", 1) != 0]
    return not any(m["content"].strip() or m.get("tool_calls") for m in said)


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Messages with the row's system message first, unless they have one."""
    if row.get("system") and messages[:1] and messages[0]["role"] != "system":
        return [{"role": "system", "content": _string(row, "system")}, *messages]
    return messages


def _make_text(row: dict[str, Any]) -> dict[str, Any]:
    text = _string(row, "text")
    if not text.strip():
        raise SkipRow("empty text")
    return {"text": text}


def _make_messages(row: dict[str, Any]) -> dict[str, Any]:
    messages = _with_system(row, as_messages(row["messages"]))
    if not messages:
        raise SkipRow("no messages")
    if all(not message["content"].strip() for message in messages):
        raise SkipRow("empty messages")
    return {"messages": messages}


def _make_prompt(row: dict[str, Any]) -> dict[str, Any]:
    prompt = _prompt(row)
    if blank_prompt(prompt):
        raise SkipRow("empty prompt")
    if isinstance(prompt, list):
        _check_prompt(prompt)
    return {"prompt": prompt}


def _prompt(row: dict[str, Any]) -> Content:
    """The prompt; a string beside a column `system` becomes a user turn."""
    prompt = _content(row, "prompt")
    if isinstance(prompt, str):
        if "system" not in row:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    return _with_system(row, prompt)


def _check_prompt(prompt: list[Message]) -> None:
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"prompt ends with a turn of {prompt[-1]['role']}, not of the user")


def _make_completion(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = _prompt(row), _content(row, "completion")
    if blank(completion):
        raise SkipRow("empty completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [_assistant(completion)] if isinstance(completion, str) else completion
    if not prompt:
        raise SkipRow("empty prompt")
    _check_prompt(prompt)
    if completion[0]["role"] != "assistant":
        raise ValueError(f"completion begins with a turn of {completion[0]['role']}, not of the assistant")
    return {"prompt": prompt, "completion": completion}


def blank_prompt(prompt: Content) -> bool:
    """Whether a prompt has nothing to answer."""
    return not prompt or (isinstance(prompt, str) and not prompt.strip())


def _alpaca_prompt(row: dict[str, Any]) -> list[Message]:
    """The user turn; it keeps its `input`, so that rendering without a template can follow Alpaca's format."""
    instruction = _string(row, "instruction")
    given = _string(row, "input") if row.get("input") else ""
    given = given if given.strip() else ""
    if not instruction.strip() and not given:
        raise SkipRow("empty prompt")
    messages: list[Message] = []
    for turn in _history(row.get("history")):
        if not isinstance(turn, (list, tuple)) or [type(said) for said in turn] != [str, str]:
            raise ValueError(f"history holds {kind_of(turn)}, not pairs of strings")
        messages += [{"role": "user", "content": turn[0], "input": ""}, _assistant(turn[1])]
    content = f"{instruction}\n{given}" if given else instruction
    return _with_system(row, [*messages, {"role": "user", "content": content, "input": given}])


def _history(value: Any) -> list | tuple:
    """Earlier turns; csv holds the list as JSON, or nothing."""
    turns = value or ()
    if isinstance(turns, str):
        with contextlib.suppress(ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"history is {kind_of(value)}, not pairs of strings")
    return turns


def _make_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    prompt, output = _alpaca_prompt(row), _string(row, "output")
    if not output.strip():
        raise SkipRow("empty completion")
    return {"prompt": prompt, "completion": [_assistant(output)]}


def _make_instruction(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": _alpaca_prompt(row)}


def _make_pair(row: dict[str, Any]) -> dict[str, Any]:
    prompt, chosen, rejected = _sides(_ordered(row))
    if isinstance(prompt, str):
        if not chosen.strip() or not rejected.strip():
            raise SkipRow("empty completion")
        if chosen == rejected:
            raise SkipRow("chosen equal to rejected")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        prompt, chosen, rejected = split_pair(chosen, rejected)
    except ValueError as reason:
        raise SkipRow(str(reason)) from None
    if blank(chosen) or blank(rejected):
        raise SkipRow("empty completion")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _make_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """The chosen side of a pair: its last answer as completion, the rest as prompt."""
    prompt, chosen, _ = _sides(_ordered(row))
    if isinstance(prompt, list):
        chosen = until_answer(chosen)
        prompt = until_request(chosen)
        chosen = chosen[len(prompt) :]
    if blank(chosen):
        raise SkipRow("empty completion")
    return {"prompt": prompt, "completion": chosen}


def _make_prompt_of_pair(row: dict[str, Any]) -> dict[str, Any]:
    prompt, chosen, _ = _sides(row)
    if isinstance(prompt, list):
        prompt = until_request(until_answer(chosen))
    if blank_prompt(prompt):
        raise SkipRow("empty prompt")
    return {"prompt": prompt}


def _sides(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A pair as prompt and two strings, or as a list (any) and two whole dialogues; a side may be absent."""
    prompt: Content | None = None
    if row.get("prompt") is not None:
        prompt = _prompt(row)
    elif "messages" in row:
        prompt = _with_system(row, as_messages(row["messages"]))
    elif "instruction" in row:
        prompt = _alpaca_prompt(row)
    sides: dict[str, Any] = {name: _content(row, name) for name in ("chosen", "rejected") if name in row}
    if (isinstance(prompt, list) and prompt in sides.values()) or _repeats(prompt, sides):
        prompt = None
    strings = {isinstance(side, str) for side in sides.values()}
    if strings == {True, False}:
        raise ValueError("one of chosen and rejected is a string, the other a list of messages")
    if strings == {True}:
        if isinstance(prompt, str):
            return prompt, sides["chosen"], sides.get("rejected")
        if prompt is None:
            if not all(is_dialogue(side) for side in sides.values()):
                if "prompt" in row:
                    raise SkipRow("prompt is null")
                raise ValueError("no prompt, and no dialogues (\\n\\nHuman: ... \\n\\nAssistant: ...) that hold one")
            whole = {name: parse_dialogue(side) for name, side in sides.items()}
            return [], whole["chosen"], whole.get("rejected")
        sides = {name: [_assistant(side)] for name, side in sides.items()}
    whole = {name: _whole(prompt, side) for name, side in sides.items()}
    return [], whole["chosen"], whole.get("rejected")


def _repeats(prompt: Any, sides: Mapping[str, Any]) -> bool:
    """Whether a prompt only repeats how two dialogues in Anthropic's form begin, or one of their turns."""
    if not isinstance(prompt, str) or not all(isinstance(side, str) and is_dialogue(side) for side in sides.values()):
        return False
    words = prompt.split()
    turns = [[m["content"].split() for m in parse_dialogue(side)] for side in sides.values()]
    return all(side.split()[: len(words)] == words for side in sides.values()) or all(words in said for said in turns)


def _ordered(row: dict[str, Any]) -> dict[str, Any]:
    """Chosen and rejected in the order of `preference`: 1, 2, or None for no preference."""
    if "preference" not in row:
        return row
    if row["preference"] == 2:
        if "rejected" not in row:
            raise SkipRow("rejected is null")
        return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    if row["preference"] != 1:
        raise SkipRow("no preference between the sides")
    return row


def _whole(prompt: Content | None, side: list[Message]) -> list[Message]:
    """A side of a pair as a whole dialogue, prompt included."""
    if not side:
        raise SkipRow("empty completion")
    if prompt is None:
        return side
    if isinstance(prompt, list):
        if not prompt or side[0]["role"] == "assistant":
            return prompt + side
        system = [message for message in (*side[:1], *prompt[:1]) if message["role"] == "system"][:1]
        begin, whole = (messages[messages[0]["role"] == "system" :] for messages in (prompt, side))
        if _said(whole[: len(begin)]) == _said(begin):
            return system + whole
        if prompt[-1]["role"] == "assistant":
            return prompt + side
        raise ValueError("chosen and rejected are whole dialogues, and prompt is not how they begin")
    if side[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}, *side]
    # A prompt column beside whole dialogues repeats one of their turns.
    words = prompt.split()
    if not any(message["content"].split() == words for message in side):
        raise ValueError("chosen and rejected are whole dialogues, and prompt is none of their turns")
    return side


def _said(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


PROMPT_FIELDS = ("prompt", "messages", "instruction", "input", "system", "history")
_STRING_PROMPT = ColumnSet("prompt", ("prompt",), ("system",), _make_prompt)
_INSTRUCTION = ColumnSet("prompt", ("instruction",), ("input", "system", "history"), _make_instruction)

COLUMN_SETS: tuple[ColumnSet, ...] = (
    ColumnSet("pair", ("chosen", "rejected"), (*PROMPT_FIELDS, "preference"), _make_pair),
    ColumnSet("messages", ("messages",), ("system",), _make_messages),
    ColumnSet("completion", ("prompt", "completion"), ("system",), _make_completion),
    ColumnSet("completion", ("instruction", "output"), ("input", "system", "history"), _make_alpaca),
    _STRING_PROMPT,
    _INSTRUCTION,
    ColumnSet("text", ("text",), (), _make_text),
)

# (form that is read, required columns of a set of another form) -> how to reduce it: pairs to the chosen completion,
# everything to its prompt
_NARROWED: dict[tuple[str, tuple[str, ...]], ColumnSet] = {
    ("completion", ("chosen", "rejected")): ColumnSet(
        "completion", ("chosen",), (*PROMPT_FIELDS, "preference", "rejected"), _make_chosen
    ),
    ("prompt", ("chosen", "rejected")): ColumnSet("prompt", ("chosen",), PROMPT_FIELDS, _make_prompt_of_pair),
    ("prompt", ("prompt", "completion")): _STRING_PROMPT,
    ("prompt", ("instruction", "output")): _INSTRUCTION,
}


def narrowed(columns: ColumnSet, reads: Reads | None) -> ColumnSet:
    """The columns of a set that are used where its form is not read itself, but one that can be made of it."""
    if reads is None or columns.form in reads.forms:
        return columns
    found = (_NARROWED.get((form, columns.required)) for form in reads.forms)
    return next(filter(None, found), columns)
