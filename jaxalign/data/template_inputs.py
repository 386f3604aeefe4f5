"""What a chat template is given beside messages: tools, and values of names that it reads, `chat_template_kwargs`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxalign.errors import InputError

COLUMN = "chat_template_kwargs"  # of a record: values for its own rendering, as TRL has them

_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))  # by every rendering
_FUNCTIONS = frozenset(("raise_exception", "strftime_now"))  # of transformers
_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # transformers' own tags
_FIX = "--config.model.chat_template=FILE.jinja"


class TemplateInputs(NamedTuple):
    """What a record gives the template beside its messages."""

    tools: list | None = None  # schemas
    values: Mapping[str, Any] = {}  # by names that the template reads


def inputs_of(columns: Mapping[str, Any]) -> TemplateInputs:
    """What a record's columns give the template: `tools` and `chat_template_kwargs`, each as it is or as JSON.

    Raises:
      InputError: `chat_template_kwargs` that is no object, or has a name that every rendering gives.

    >>> inputs_of({"chat_template_kwargs": '{"enable_thinking": false}'})
    TemplateInputs(tools=None, values={'enable_thinking': False})
    """
    return TemplateInputs(_tools(columns.get("tools")), _values(columns.get(COLUMN)))


def _tools(tools: Any) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            return None
    return tools if isinstance(tools, list) and tools and all(isinstance(t, dict) for t in tools) else None


def _values(given: Any) -> dict[str, Any]:
    values = given
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            values = json.loads(given) if given.strip() else {}
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InputError(
            f"{COLUMN} is {str(given)[:60]!r}", "an object of names and values", '{"enable_thinking": false}'
        )
    if taken := sorted(_GIVEN.intersection(values)):
        raise InputError(f"{COLUMN} has the name {taken[0]!r}", "names that no rendering gives", f"without {taken[0]}")
    return {str(name): value for name, value in values.items() if value is not None}  # null fills a column of structs


def names_read(template: str | Mapping[str, str]) -> frozenset[str]:
    """The names of its own that a template, or one of several, reads: neither set by it, but where it asks whether a
    value is given, nor by every rendering.

    Raises:
      jinja2.TemplateSyntaxError: it is no template.

    >>> sorted(names_read("{% for m in messages %}{{ m.content if think else bos_token }}{% endfor %}"))
    ['bos_token', 'think']
    """
    sources = [template] if isinstance(template, str) else template.values()
    return frozenset().union(*map(_names_read, sources)) - _GIVEN - _FUNCTIONS


@functools.cache
def _names_read(source: str) -> frozenset[str]:
    import jinja2
    import jinja2.ext
    import jinja2.meta
    from jinja2 import nodes

    tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(_MARKS.sub("", source))
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name == "defined"]
    asked = {node.name for node in tests if isinstance(node, nodes.Name)}
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"} - asked
    return frozenset(jinja2.meta.find_undeclared_variables(tree)) - own  # one that is set in a branch is among them


def unread(template: str | Mapping[str, str] | None, names: Iterable[str]) -> list[str]:
    """Those of the names that the template never reads; all of them where there is none."""
    return [name for name in names if not template or name not in names_read(template)]


def set_defaults(tokenizer: Any, values: Mapping[str, Any], flag: str) -> None:
    """Writes values into a tokenizer's chat template, as what its names stand for where a rendering gives none.

    In the template they hold for every rendering: of rows, of prompts, of an export in transformers and in vLLM.
    Whoever renders may still give another value.

    Args:
      tokenizer: of transformers; its `chat_template` is replaced.
      values: JSON values by name.
      flag: what gave them, for messages.

    Raises:
      InputError: no template, or a name that it never reads or that every rendering gives.
    """
    if not values:
        return
    import jinja2

    template, names = tokenizer.chat_template, ", ".join(values)
    if not template:
        raise InputError(f"{flag} {names}, and the tokenizer has no chat template", "a template that reads it", _FIX)
    try:
        read = sorted(names_read(template) - set(tokenizer.special_tokens_map))
    except jinja2.TemplateSyntaxError as error:
        words = f"the chat template of the tokenizer, line {error.lineno}: {error.message}"
        raise InputError(words, "a Jinja template", _FIX) from error
    for name in values:
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1, cutoff=0.0)
            raise InputError(
                f"{flag} gives {name!r}, which the chat template never reads",
                f"a name that it reads: {', '.join(read) or 'there is none'}",
                f"{flag}={json.dumps({near[0]: values[name]})!r}" if near else f"without {flag}",
            )
    lines = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in values.items()
    )
    tokenizer.chat_template = (
        _behind(lines, template) if isinstance(template, str) else {k: _behind(lines, t) for k, t in template.items()}
    )


def _behind(lines: str, template: str) -> str:
    return template if template.startswith(lines) else lines + template  # an export has them already


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it.

    >>> _literal({"a": [None, True, "é"]})
    '{"a": [none, true, "é"]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
