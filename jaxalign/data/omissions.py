"""Finds what a chat template leaves out of a conversation, and markers that are not single tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxalign.data.records import Message
from jaxalign.data.thoughts import thoughts_of

# Markers of turns as templates write them: <|im_end|>, <|eot_id|>, <｜Assistant｜>, <end_of_turn>, </s>.
_MARKER = re.compile(r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,60}｜>|<(?:start|end)_of_turn>|</?s>|<[be]os>")


def left_out(messages: Sequence[Message], text: str) -> tuple[str, ...]:
    """The parts of a conversation that are not in its rendered text, by the names that the report counts.

    A message's content is looked for behind that of the message before it, then anywhere; a template may trim it,
    write it as JSON, or change its white space and punctuation.

    >>> left_out([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "<u>Hi</u>")
    ('system turns',)
    """
    lost: dict[str, None] = {}
    place, squeezed = 0, ""
    for message in messages:
        said = message.get("content")
        words = said.strip() if isinstance(said, str) else ""
        thoughts = thoughts_of(message)
        if thoughts and thoughts not in text:
            lost["reasoning"] = None
        at = text.find(words, place)
        if at >= 0:
            place = at + len(words)
            continue
        squeezed = squeezed or _squeezed(text)
        if words in text or any(form in text for form in _as_json(words)) or _squeezed(words) in squeezed:
            continue
        answer = words.rsplit("</think>", 1)[-1].strip()
        known = answer != words and answer in text
        lost["reasoning" if known else f"{message.get('role')} turns"] = None
    return tuple(lost)


def _as_json(words: str) -> tuple[str, str]:
    return json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]


def _squeezed(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def unread_tools(columns: dict[str, Any], tools: list | None) -> bool:
    """Whether a record has a column of tools that is no list of schemas, so that no template sees it.

    Args:
      columns: of the record.
      tools: what `template_inputs.inputs_of` made of it.
    """
    given = columns.get("tools")
    empty = given is None or (isinstance(given, str) and given.strip().lower() in ("", "[]", "{}", "null", "none"))
    return tools is None and not empty and given not in ([], {}, ())


def split_markers(text: str, tokenizer: Any) -> dict[str, int]:
    """The markers in a rendered text that the tokenizer has no token for, with the number of tokens that each becomes.

    Args:
      text: rendered by a chat template, with nothing of a user's in it.
      tokenizer: of transformers.
    """
    found = {}
    for marker in dict.fromkeys(_MARKER.findall(text)):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(marker, add_special_tokens=False)["input_ids"])
        if marker not in tokens:
            found[marker] = len(tokens)
    return found


def with_system_turns(messages: list[Message], how: str) -> list[Message]:
    """Messages without system turns: folded into the user's turn that follows, or dropped.

    A system turn that no user's turn follows becomes one.

    Args:
      messages: a conversation, or a part of one.
      how: keep, fold or drop.

    >>> with_system_turns([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "fold")
    [{'role': 'user', 'content': 'Be brief.\\n\\nHi'}]
    """
    if how == "keep" or all(message["role"] != "system" for message in messages):
        return messages
    kept: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"]] if how == "fold" else []
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": "\n\n".join((*waiting, message["content"]))}
        elif waiting:
            kept.append({"role": "user", "content": "\n\n".join(waiting)})
        waiting = []
        kept.append(message)
    return [*kept, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else kept
