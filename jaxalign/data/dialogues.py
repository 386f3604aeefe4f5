r"""Dialogues: message lists from the shapes that data has, and dialogues as plain text.

Text in the form of Anthropic's sets, `"\n\nHuman: ...\n\nAssistant: ..."`, becomes a list of messages by
`parse_dialogue`; `render_plain` is its inverse, and what a tokenizer without a chat template is given.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Names of the four roles in public data.
_ROLE_NAMES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_WEIGHT_KEYS = ("weight", "loss_weight")


def as_messages(value: Any) -> list[Message]:
    """A list of messages `{"role", "content", ...}` from any of the shapes that data has.

    Roles may stand under `role` or `from` and bear ShareGPT's names; content may stand under `content`, `value` or
    `text`, as a string or as a list of text parts; a single message and a dict of lists are taken too.  What else a
    message carries stays where it is not null; a `weight` or `loss_weight` of 0 stays as `"weight": 0`.
    ShareGPT's turn `function_call` is the assistant's: its content stays JSON, `function_call` holds it as tool calls.

    Raises:
      ValueError: saying which message is wrong and how.

    >>> as_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    if isinstance(value, Mapping):
        columns = [v for v in value.values() if v is not None]
        if columns and all(isinstance(v, (list, tuple)) for v in columns) and _get(value, _ROLE_KEYS) is not None:
            if len({len(v) for v in columns}) != 1:  # a struct of lists, as `datasets` stores a list of structs
                raise ValueError("lists of roles and contents of different lengths")
            value = [dict(zip(value, row)) for row in zip(*columns)] if len(columns) == len(value) else None
        else:
            value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{kind_of(value)} where a list of messages is due")
    return [_message(item, number) for number, item in enumerate(value, 1)]


def _get(item: Mapping, keys: tuple[str, ...]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"message {number} is {kind_of(item)}, not an object with role and content")
    name = _get(item, _ROLE_KEYS)
    role = _ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"message {number} has the role {name!r}; known are {', '.join(sorted(_ROLE_NAMES))}")
    content = _get(item, _CONTENT_KEYS)
    if content is None and item.get("tool_calls"):
        content = ""
    message: Message = {"role": role, "content": _text(content, number)}
    known = _ROLE_KEYS + _CONTENT_KEYS + _WEIGHT_KEYS
    message |= {key: extra for key, extra in item.items() if key not in known and extra is not None}
    weight = _get(item, _WEIGHT_KEYS)
    if weight not in (None, 0, 1):
        raise ValueError(f"message {number} has the weight {weight!r}; a message counts (1) or does not (0)")
    if weight == 0:
        message["weight"] = 0
    if role == "assistant" and str(name).strip().lower() == "function_call" and (calls := _calls(message["content"])):
        message["function_call"] = calls
    return message


def _calls(text: str) -> list[dict[str, Any]]:
    """ShareGPT's turn `function_call`, JSON of a call or of several, as tool calls; none where it is something else."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    found = []
    for call in calls:
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        found.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return found


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        parts = []
        for part in content:
            text = (
                part if isinstance(part, str) else _get(part, ("text", "value")) if isinstance(part, Mapping) else None
            )
            sort = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if sort != "text" or not isinstance(text, str):
                raise ValueError(f"message {number} has a part of type {sort!r}; only text can be trained on")
            parts.append(text)
        return "".join(parts)
    raise ValueError(f"message {number} has {kind_of(content)} for content, not a string")


def kind_of(value: Any) -> str:
    """A value's type and beginning, for messages.

    >>> kind_of(None), kind_of(5), kind_of([1, 2])
    ('null', 'the number 5', 'a list of 2')
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the string {value[:40] + '...' if len(value) > 40 else value!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        text = str(value)
        return f"the number {text[:40] + '...' if len(text) > 40 else text}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no keys'}"
    return f"a {type(value).__name__}"


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _framed(text: str) -> str:
    """A dialogue with its first speaker on a paragraph of its own, and paragraphs parted by plain newlines."""
    if "\r\n\r\n" in text:
        text = text.replace("\r\n", "\n")
    start = text.lstrip()
    return f"\n\n{start}" if start.startswith("Human:") else text


def is_dialogue(text: str) -> bool:
    r"""Whether a string is a dialogue in Anthropic's format: a human turn first, and an assistant turn.

    >>> is_dialogue("\n\nHuman: Hi\n\nAssistant: Yes?"), is_dialogue("The Human: a history")
    (True, False)
    """
    text = _framed(text)
    first = text.find("\n\nHuman:")
    return first >= 0 and text.find("\n\nAssistant:") > first


def parse_dialogue(text: str) -> list[Message]:
    r"""The turns of a dialogue in Anthropic's format; text before the first turn is a system message.

    One space behind a speaker's colon belongs to the form; all other white space is the turn's own.

    >>> parse_dialogue("\n\nHuman: Hi\n\nAssistant: Yes?")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'}]
    """
    pieces = _TURN.split(_framed(text))
    messages = [{"role": "system", "content": pieces[0].strip()}] if pieces[0].strip() else []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": said.removeprefix(" ")})
    return messages


_PLAIN_ROLES = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
_ALPACA_TASK = "Below is an instruction that describes a task. "
_ALPACA_TASK_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
_ALPACA_REQUEST = "Write a response that appropriately completes the request."


def render_plain(messages: list[Message], add_generation_prompt: bool = False) -> str:
    r"""A dialogue as text, for a tokenizer without a chat template.

    Messages made from Alpaca columns (their user turns have an `input` key) get Stanford Alpaca's framing, all
    others that of Anthropic's sets.  The text of the first n messages with the generation prompt is always a
    prefix of the text of n + 1 messages where the last is the assistant's.

    Args:
      messages: roles system, user, assistant, tool.
      add_generation_prompt: whether to open the assistant's turn at the end.

    >>> render_plain([{"role": "user", "content": "Hi"}], True)
    '\n\nHuman: Hi\n\nAssistant:'
    >>> print(render_plain([{"role": "user", "content": "Add.\n1 2", "input": "1 2"}], True).split("request.")[1])
    <BLANKLINE>
    <BLANKLINE>
    ### Instruction:
    Add.
    <BLANKLINE>
    ### Input:
    1 2
    <BLANKLINE>
    ### Response:
    <BLANKLINE>
    """
    first = next((message for message in messages if message["role"] == "user"), {})
    alpaca = "input" in first  # the first user turn decides, so that a prompt's rendering is a prefix of the whole
    text = "".join(_alpaca(messages)) if alpaca else "".join(_dialogue(messages))
    if not add_generation_prompt:
        return text
    return text + ("\n\n### Response:\n" if alpaca else "\n\nAssistant:")


def _dialogue(messages: list[Message]):
    for number, message in enumerate(messages):
        if number == 0 and message["role"] == "system":
            yield message["content"]
        else:
            yield f"\n\n{_PLAIN_ROLES[message['role']]}: {message['content']}"


def _alpaca(messages: list[Message]):
    if messages[0]["role"] != "system":
        yield (_ALPACA_TASK_INPUT if messages[0].get("input") else _ALPACA_TASK) + _ALPACA_REQUEST
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if number == 0 and role == "system":
            yield content
        elif role == "assistant":
            yield f"\n\n### Response:\n{content}"
        elif role == "user":
            given = message.get("input")
            instruction = content.removesuffix(given).removesuffix("\n") if given else content
            yield f"\n\n### Instruction:\n{instruction}" + (f"\n\n### Input:\n{given}" if given else "")
        else:
            yield f"\n\n### {_PLAIN_ROLES[role]}:\n{content}"


def split_pair(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Splits two dialogues into their common prompt and the two completions, at a turn boundary.

    Turns of others behind the last answer of the assistant are left out: nothing in them is scored.

    Returns:
      prompt, rest of chosen, rest of rejected; the rests begin with the turn in which the sides part.

    Raises:
      ValueError: with the reason why the dialogues are no pair.

    >>> u, a, b = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
    >>> split_pair([u, a], [u, b]) == ([u], [a], [b])
    True
    """
    if chosen == rejected:
        raise ValueError("chosen equal to rejected")
    chosen, rejected = until_answer(chosen), until_answer(rejected)
    if not chosen or not rejected:
        raise ValueError("no assistant turn")
    if chosen == rejected:
        raise ValueError("chosen and rejected differ only behind the last answer")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if not any(message["role"] in ("user", "tool") for message in prompt):
        raise ValueError("chosen and rejected answer different prompts")
    if shared in (len(chosen), len(rejected)):
        raise ValueError("one side is the beginning of the other")
    return prompt, chosen[shared:], rejected[shared:]


def until_answer(messages: list[Message]) -> list[Message]:
    """A dialogue up to the assistant's last turn; empty where there is none."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def until_request(messages: list[Message]) -> list[Message]:
    """A dialogue up to the last user or tool turn; empty where there is none."""
    last = max((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), default=-1)
    return messages[: last + 1]
