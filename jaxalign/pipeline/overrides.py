"""Setting fields from text, given on the command line or in a YAML or JSON config."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference

from jaxalign.errors import InputError
from jaxalign.pipeline.mistakes import no_field, no_section


def override(config: ConfigDict, field: str, text: str | None, *, extend: bool = False) -> None:
    """Sets one field from the command line's text, by the type that the field has.

    - A number, a boolean (true/false) or a string, as it stands.  `None` empties a field that may be empty.
    - A tuple: one value (`a.jsonl`), several with commas (`a.jsonl,b.jsonl`), the flag repeated, or a Python or
      JSON literal (`[{"path": "a.jsonl", "weight": 2}]`); one dict is a tuple of one.
    - A section: a dict of the fields to change; the others stay.

    Args:
      config: changed in place.
      field: dotted name, as in "optimizer.learning_rate".
      text: None for a flag without a value, which is true.
      extend: a tuple's values are added to those that are there: the flag was repeated.

    Raises:
      InputError: there is no such field, or the text is not of its type.

    >>> from jaxalign.config import defaults
    >>> c = defaults("dpo")
    >>> override(c, "data.sources", "a.jsonl,b.jsonl")
    >>> c.data.sources
    ('a.jsonl', 'b.jsonl')
    >>> override(c, "model.train", "embed[5,7:9],norm")
    >>> c.model.train
    ('embed[5,7:9]', 'norm')
    >>> override(c, "mesh", "{'tensor': 2}")
    >>> c.mesh.tensor, c.mesh.fsdp
    (2, -1)
    """
    *parents, name = field.split(".")
    node: Any = config
    for key in parents:
        node = node[key] if isinstance(node, ConfigDict) and key in node else None
    if not isinstance(node, ConfigDict) or name not in node:
        raise no_field(config, field, f"--config.{field}: there is no such field", "true" if text is None else text)
    kind = node.get_type(name)
    if issubclass(kind, ConfigDict):
        values = _literal(text)
        if not isinstance(values, dict):
            raise no_section(config, field, text, _given(field, text))
        for key, value in values.items():
            override(config, f"{field}.{key}", value if isinstance(value, str) else repr(value))
        return
    value = _parse(field, kind, text, may_be_empty=_is_placeholder(node, name), now=node[name])
    node[name] = node[name] + value if extend and kind is tuple else value


def _parse(field: str, kind: type, text: str | None, *, may_be_empty: bool, now: Any) -> Any:
    """The text as a value of the field's type; the scalars are read by absl's own parsers.  `now` is its value."""
    if may_be_empty and text == "None":
        return None
    if kind in (bool, object):  # object: a boolean or one of the allowed words
        if text is None:
            return True
        try:
            return flags.BooleanParser().parse(text)
        except ValueError:
            if kind is object:
                return text
            raise _unfit(field, text, "true or false", "true") from None
    if text is None:
        raise _unfit(field, text, f"a value of type {kind.__name__}", "...")
    if kind is tuple:
        return tuple_of(field, text)
    if kind is int:
        try:
            value = float(text) if "e" in text.lower() and not text.lower().startswith("0x") else int(text, 0)
            if value == int(value):
                return int(value)
        except (ValueError, OverflowError):
            pass
        raise _unfit(field, text, "a whole number", "100" if now is None else str(now))
    if kind is float:
        try:
            return flags.FloatParser().parse(text)
        except (ValueError, TypeError):
            raise _unfit(field, text, "a number", "0.1" if now is None else str(now)) from None
    return text


def tuple_of(field: str, text: str) -> tuple:
    """The values of a field that is a tuple, as `override` reads them."""
    value = _literal(text)
    if value is _NOT_A_LITERAL:
        if text.lstrip()[:1] in tuple("([{"):
            example = '{"enable_thinking": false}' if "kwargs" in field else '[{"path": "a.jsonl"}]'
            raise _unfit(field, text, "a Python or JSON literal", f"{example} (quote it for the shell)")
        if parts := tuple(part.strip() for part in _COMMA.split(text) if part.strip()):
            return parts
        raise _unfit(field, text, "a value, several with commas, or None for none", "None")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


_NOT_A_LITERAL = object()
_COMMA = re.compile(r",(?![^\[]*\])")  # between values, not within brackets: lm_head[5,7]


def _literal(text: str | None) -> Any:
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text or "")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return _NOT_A_LITERAL


def _is_placeholder(node: ConfigDict, name: str) -> bool:
    """Whether the field was declared as one that may be empty."""
    return any(k == name and isinstance(v, FieldReference) for k, v in node.items(preserve_field_references=True))


def _unfit(field: str, text: str | None, expected: str, example: str) -> InputError:
    return InputError(_given(field, text), expected, f"--config.{field}={example}")


def _given(field: str, text: str | None) -> str:
    return f"--config.{field}" + ("" if text is None else f"={text[:300]}{'...' if len(text) > 300 else ''}")
