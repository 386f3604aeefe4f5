"""Prompts and completions from a data file, line by line, in order."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxalign.data.files import Raw, read_file
from jaxalign.errors import InputError


class Line(NamedTuple):
    """A prompt and its completion, with their place in the file."""

    where: str
    prompt: str
    completion: str


def read_lines(path: str) -> list[Line]:
    """The lines of a file, each with plain strings `prompt` and `completion`.

    Args:
      path: jsonl, or any other format that jaxalign reads.

    Returns:
      The lines in order; blank ones are left out.

    Raises:
      InputError: no such file, none in it, or a line without these two strings; the line is named.
    """
    lines = [Line(raw.where, _string(raw, "prompt"), _string(raw, "completion")) for raw in read_file(path)]
    if not lines:
        raise InputError(f"{path} holds no lines", "at least one", '{"prompt": "Once upon", "completion": " a time"}')
    return lines


def _string(raw: Raw, key: str) -> str:
    value: Any = raw.row.get(key)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{raw.where}: {key!r} holds half a surrogate pair", "whole characters", f"repair line {raw.line}"
            ) from None
        return value
    if key not in raw.row:
        found = f"{raw.where}: no {key!r} (it has {', '.join(map(repr, raw.row)) or 'nothing'})"
    else:
        found = f"{raw.where}: {key!r} is {type(value).__name__}"
    raise InputError(found, f"{key!r}: a string", f'{{"prompt": "...", "completion": "..."}} in line {raw.line}')
