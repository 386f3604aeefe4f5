"""An assistant's thoughts: the keys of a message that hold them, and the markers that templates write around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxalign.data.records import Message

KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages, as public data and templates name them

_READ = {key: re.compile(rf"""(?:\.|\[['"]|get\(['"]){key}\b""") for key in KEYS}
# <think>, </think>, <|START_THINKING|>, <seed:think>, [THINK]
_MARKER = r"(?:<[^<>\s]*|\[[^\[\]\s]*)(?:think|thought|reason)[^<>\[\]\s]*[>\]]"
_IN_CONTENT = re.compile(rf"\A\s*{_MARKER}|(?:</|\[/|<\|END_)[^<>\[\]\s]*(?:think|thought|reason)", re.IGNORECASE)
_MARKERS = re.compile(rf"\s*(?:{_MARKER}\s*)+", re.IGNORECASE)
_LAST_MARKER = re.compile(rf"{_MARKER}\s*\Z", re.IGNORECASE)
_OPEN_MARKER = re.compile(r"[<\[][^<>\[\]\s]*\Z")


def keys_read(template: str | Mapping[str, str] | None) -> tuple[str, ...]:
    """Those of a message's keys for thoughts that a template reads.

    >>> keys_read("{{ message.reasoning_content }}{{ thinking }}")
    ('reasoning_content',)
    """
    return tuple(key for key in KEYS if _READ[key].search(str(template or "")))


def thoughts_of(message: Mapping[str, Any]) -> str:
    """The thoughts that stand under a key of a message; "" where there are none."""
    return next((message[key] for key in KEYS if isinstance(message.get(key), str)), "").strip()


def under_key(message: Message, keys: tuple[str, ...]) -> Message:
    """A message whose thoughts stand under a key that the template reads, whatever the data calls it.

    >>> under_key({"content": "4", "thinking": "2 + 2"}, ("reasoning_content",))["reasoning_content"]
    '2 + 2'
    """
    if not keys or any(key in message for key in keys) or not thoughts_of(message):
        return message
    return {**message, keys[0]: thoughts_of(message)}


def has_thoughts(message: Mapping[str, Any]) -> bool:
    """Whether a message brings thoughts of its own, under a key or before or between markers in its content."""
    return bool(thoughts_of(message) or _IN_CONTENT.search(str(message.get("content") or "")))


def after_markers(text: str, start: int, end: int) -> int:
    r"""The end of the markers that stand at `start`, with nothing but white space between them; `start` for none.

    >>> after_markers("<think>\n\n</think>\n\n4", 0, 20)
    19
    """
    found = _MARKERS.match(text, start, end)
    return start if found is None else found.end()


def before_marker(text: str, end: int) -> int:
    r"""The start of a marker that ends at `end`, but for white space; `end` for none.

    >>> before_marker("<a><think>\n2 + 2", 11)
    3
    """
    found = _LAST_MARKER.search(text, 0, end)
    return end if found is None else found.start()


def outside_marker(text: str, end: int) -> int:
    """`end`, or the start of the marker that it is within.

    >>> outside_marker("<a></think>", 4)
    3
    """
    found = _OPEN_MARKER.search(text, 0, end)
    return end if found is None else found.start()
