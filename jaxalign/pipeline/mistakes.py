"""Error messages for configurations: unknown fields, values of the wrong type, config files that raise."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxalign.config import defaults, get, leaves
from jaxalign.errors import InputError
from jaxalign.pipeline.aliases import ABSENT, ALIASES, meaning
from jaxalign.ranges import CHOICES, bounds, misfit
from jaxalign.registry import ALGORITHMS

_NONE = object()


def nearest_field(config: ConfigDict, name: str) -> str:
    """The field that was most likely meant: by another program's name for it, else the most similar name.

    A field of the same section counts as nearer than one of another, and one that begins with the same letter.

    >>> nearest_field(defaults("dpo"), "optimizer.learnin_rate"), nearest_field(defaults("sft"), "lr")
    ('optimizer.learning_rate', 'optimizer.learning_rate')
    >>> nearest_field(defaults("dpo"), "bata")
    'algorithm.beta'
    """
    names = list(leaves(config))
    section, _, tail = name.rpartition(".")
    stage = name.partition(".")[0]
    for field in ALIASES.get(_alias(config, name), ()):
        there = [n for n in names if f".{n}".endswith(f".{field}")]
        if there:
            return next((n for n in there if n.startswith(f"{stage}.")), there[0])

    def likeness(other: str) -> float:
        there, _, its_tail = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, tail, its_tail).ratio() + 0.1 * (tail[:1] == its_tail[:1])
        return alike + 0.25 * (there == section) + 0.1 * difflib.SequenceMatcher(None, name, other).ratio()

    return max(names, key=likeness, default="")


def _alias(config: ConfigDict, name: str) -> str:
    """The alias in a name: the whole name, or without its stage or section; "" for none."""
    stage, _, rest = name.partition(".")
    own = (rest if stage in _stages(config) and rest else name).lower()
    tail = name.rpartition(".")[2]
    if own in ALIASES or tail in {n.rpartition(".")[2] for n in leaves(config)}:  # a field's own name, elsewhere
        return own if own in ALIASES else ""
    return tail.lower() if tail.lower() in ALIASES else ""


def _absent(name: str) -> tuple[str, str] | None:
    """Of another program's name that no field here is: a sentence, and what to do."""
    return ABSENT.get(name.lower()) or ABSENT.get(name.rpartition(".")[2].lower())


class Place(NamedTuple):
    """Where a config file names a field."""

    line: str  # "line 4 of c.py"
    tree: str  # the variable that holds the tree

    def __call__(self, field: str) -> str:
        """The field as Python has it."""
        parts = (f".{p}" if p.isidentifier() and not iskeyword(p) else f"[{p!r}]" for p in field.split("."))
        return f"{self.line}: {self.tree}{''.join(parts)}"


def no_field(config: ConfigDict, field: str, found: str, value: Any = None, place: Place | None = None) -> InputError:
    """The error for an unknown field: a stage's field without the stage, another algorithm's field, or a misspelt one.

    Args:
      config: the whole tree.
      field: dotted name.
      found: the beginning of the message.
      value: that it was to have; None: it was only read.
      place: in a config file; None: the name came as a flag.
    """
    assigned, names = value is not None, _stages(config)

    def fix(name: str, value: Any) -> str:
        if place is None:
            return _flag(config, name, value)
        text, kind = _fitting(config, name, value)
        return place(name) + (f" = {_as_python(text, kind) if text else repr(get(config, name))}" if assigned else "")

    stage, own = _parted(config, field)
    if told := _absent(own):
        leave = f"{place.line}: without it" if place else f"without --{'config.' * ('config.' in found)}{field}"
        return InputError(f"{found}; {told[0]}", "a run without it", leave + f"; {told[1]}" * bool(told[1]))
    if place is None and (columns := columns_meant(own, None if value is None else str(value))):
        prefix = next((f"{name}." for name in (stage, *names) if name), "")
        return no_columns(config, f"{prefix}data.sources", columns, found)
    staged = [f"{stage}.{field}" for stage in names if get(config[stage], field, _NONE) is not _NONE]
    if staged:
        return InputError(found, f"the name of a stage before it: {', '.join(staged)}", fix(staged[0], value))
    section = config[stage] if stage else config
    others = [name for name in ALGORITHMS if get(defaults(name), own, _NONE) is not _NONE] if own else []
    algorithm = get(section, "algorithm.name")
    if others and algorithm:
        return InputError(
            f"{found} for {algorithm}",
            f"{own} is a field of {' and '.join(others)}",
            f"{place.line}: without it"
            if place
            else f"without --config.{field}, or a config of defaults({others[0]!r})",
        )
    near, alias, note = nearest_field(config, field), _alias(config, field), ""
    its_stage, leaf = _parted(config, near)
    if assigned and leaf in ALIASES.get(alias, ()):
        value, note = meaning(alias, value, config[its_stage] if its_stage else config)
    same = [f"{name}.{leaf}" for name in names if name != its_stage and not stage]
    shown = " or ".join([near, *(name for name in same if get(config, name, _NONE) is not _NONE)])
    return InputError(found, f"the nearest name is {shown}" + (f", which {note}" if note else ""), fix(near, value))


def no_flag(config: ConfigDict, rest: Sequence[str], own: Sequence[str]) -> InputError:
    """The error for an unknown flag: a misspelt one, or a field without `--config.`.

    Args:
      config: the whole tree.
      rest: arguments, of which the first is none of the command's; its value may be the second.
      own: the command's flags.
    """
    given = rest[0][:300]
    name, equals, value = rest[0].lstrip("-").partition("=")
    if not equals:
        value = rest[1] if len(rest) > 1 and not rest[1].startswith("--") else None
    if near := difflib.get_close_matches(name.replace("-", "_"), own, n=1, cutoff=0.75):
        return InputError(f"{given}: there is no such flag", "one of --" + ", --".join(own), f"--{near[0]}")
    field = name.removeprefix("config").lstrip(".-_") if name.startswith(("config.", "config-", "config_")) else name
    field = field.replace("-", "_")
    tails = {leaf.rpartition(".")[2] for leaf in leaves(config)}
    known = _alias(config, field) or difflib.get_close_matches(field.rpartition(".")[2], tails, n=1, cutoff=0.7)
    if _absent(field):
        return no_field(config, field, f"{given}: there is no such flag")
    if not known:
        return InputError(
            f"{given}: there is no such flag", "--config=FILE --config.FIELD=VALUE --dry_run", "jaxalign train --help"
        )
    found = f"{given}: a field's flag begins with --config."
    now = get(config, field, _NONE)
    if isinstance(now, ConfigDict):
        return no_section(config, field, value, found)
    if now is not _NONE:
        return InputError(found, f"--config.{field}", f"--config.{field}={shlex.quote(value or '...')}")
    return no_field(config, field, found, "true" if value is None else value)


def no_section(config: ConfigDict, field: str, value: str | None, found: str) -> InputError:
    """The error for a value given to a section: the field in it that was most likely meant.

    Args:
      config: the whole tree.
      field: dotted name of the section.
      value: that it was given.
      found: the beginning of the message.
    """
    near = nearest_field(config, field) if _alias(config, field) else _field_that_takes(config, field, value)
    if near:
        return InputError(found, f"a value of one field, {near}, or a dict of fields", _flag(config, near, value))
    return InputError(found, "a dict of fields to change", f"--config.{field}={{...}}")


def _field_that_takes(config: ConfigDict, section: str, value: str | None) -> str:
    """The field of a section that has this value, or one like it, among its choices; "" for none."""
    fields = [f"{section}.{leaf}" for leaf in get(config, section)]
    return next(iter(takers(fields, value, lambda field: _parted(config, field)[1])), "")


def takers(fields: Iterable[str], value: str | None, own: Callable[[str], str] = str) -> list[str]:
    """Those of some fields that have a value, or one like it, among their choices.

    Args:
      fields: dotted names.
      value: as a flag gives it.
      own: from a field's name to the one it has within its stage.

    >>> takers(["algorithm.name", "optimizer.name"], "schedule_free")
    ['optimizer.name']
    """
    choices = {field: [str(choice) for choice in dict(CHOICES).get(own(field), ())] for field in fields}
    near = [f for f, known in choices.items() if difflib.get_close_matches(value or "", known, n=1, cutoff=0.75)]
    return [field for field in near if value in choices[field]] or near


_COLUMNS = re.compile(r"(?:data\.(?:sources\.)?)?columns(?:\.(\w+))?")


def columns_meant(field: str, value: str | None) -> dict[str, Any]:
    """The mapping of columns that a field's name and value stand for; empty where the name has nothing to do with them.

    >>> columns_meant("columns.prompt", "question"), columns_meant("data.columns", '{"prompt": "q"}')
    ({'prompt': 'question'}, {'prompt': 'q'})
    """
    match = _COLUMNS.fullmatch(field)
    if match is None or match[1]:
        return {match[1]: value or "..."} if match else {}
    try:
        found = ast.literal_eval(value or "")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    return found if found and isinstance(found, dict) else {"prompt": "..."}


def no_columns(config: ConfigDict, field: str, columns: Mapping[str, Any], found: str) -> InputError:
    """The error for columns given beside the sources: each source has its own.

    Args:
      config: the whole tree.
      field: the dotted name of the sources.
      columns: our names and the data's.
      found: the beginning of the message.
    """
    first = next(iter(get(config, field) or ()), "FILE")
    source = {"path": first} if isinstance(first, str) else dict(first)
    text = json.dumps([source | {"columns": dict(columns)}], ensure_ascii=False, default=str)
    return InputError(found, "the columns of a source, beside its path", f"--config.{field}={shlex.quote(text)}")


def _stages(config: ConfigDict) -> tuple[str, ...]:
    """The names of the sections that are stages, whatever a file has set `stages` to."""
    return tuple(key for key in config if isinstance(config[key], ConfigDict) and "algorithm" in config[key])


def _parted(config: ConfigDict, field: str) -> tuple[str, str]:
    """(stage, field of it); "" for a configuration without stages, and for what belongs to none."""
    stage, _, rest = field.partition(".")
    return (stage, rest) if stage in _stages(config) else ("", field)


def _flag(config: ConfigDict, field: str, value: Any) -> str:
    """The flag that sets a field, `...` for a value that is not known."""
    text, _ = _fitting(config, field, value)
    return f"--config.{field}={shlex.quote(text) if text else '...'}"


def _fitting(config: ConfigDict, field: str, value: Any) -> tuple[str, type]:
    """(a value as a flag gives it, "" where the field does not take it; the field's type)."""
    section, _, leaf = field.rpartition(".")
    kind = (get(config, section) if section else config).get_type(leaf)
    return _allowed(_parted(config, field)[1], _as_text(value, kind), kind) if value is not None else "", kind


def _allowed(field: str, text: str, kind: type) -> str:
    """A value if the field may hold it, else the nearest of those that it may; "" for a number out of bounds."""
    choices = [str(choice) for choice in dict(CHOICES).get(field, ())]
    if choices and text not in choices:
        return next(iter(difflib.get_close_matches(text, choices, n=1, cutoff=0.0)), "")
    if kind not in (int, float) or text in ("", "None"):
        return text
    try:
        return "" if misfit(float(text), *bounds(field)) else text
    except KeyError:  # a field of the config file's own
        return text


def _as_text(value: Any, kind: type) -> str:
    """A value as a flag gives it to a field of this type; "" where it does not fit.

    >>> _as_text("3.0", int), _as_text(True, bool), _as_text("many", int)
    ('3', 'true', '')
    """
    text = ",".join(map(str, value)) if kind is tuple and isinstance(value, (tuple, list)) else str(value)
    if kind is bool:
        return text.lower() if text.lower() in ("true", "false") else ""
    if text == "None" or kind not in (int, float):
        return text
    try:
        number = float(text)
        whole = number == int(number)
        return str(int(number)) if whole else "" if kind is int else text if isinstance(value, str) else f"{number:g}"
    except (ValueError, OverflowError):
        return ""


def _as_python(text: str, kind: type) -> str:
    """What a flag's text is in a config file."""
    if text == "None" or kind in (int, float):
        return text
    return text.capitalize() if kind is bool else repr(tuple(text.split(",")) if kind is tuple else text)


_UNKNOWN_KEY = re.compile(r"""Key "(\w+)" does not exist|^'(\w+)'(\nDid you mean|$)""")
_WRONG_TYPE = re.compile(
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> "
    r"and cannot be casted to type <class '([\w.]+)'>",
    re.DOTALL,
)


def broken(file: Path, error: BaseException) -> InputError:
    """An exception in a user's config file, by the line in that file."""
    here = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _same_file(f.f_code.co_filename, file)]
    line = here[-1][1] if here else None
    if isinstance(error, SyntaxError) and _same_file(error.filename or "", file):
        line = error.lineno
    place = f"{file}:{line or '?'}"
    edit = f"line {line} of {file}" if line else f"edit {file}"
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    message = cause.args[0] if cause.args and isinstance(cause.args[0], str) else _said(error)
    names = _names_in(error, here[-1][0].f_locals if here else {})
    if isinstance(error, (AttributeError, KeyError)) and names and (match := _UNKNOWN_KEY.search(message)):
        root, prefix, variable = names
        field = prefix + (match[1] or match[2])
        line_of = Place(edit, variable)
        return no_field(root, field, f"{place}: there is no field {field}", _assigned(error), line_of)
    if isinstance(error, TypeError) and names and (match := _WRONG_TYPE.search(message)):
        root, prefix, variable = names
        name, *told = match.groups()
        if isinstance(given := _assigned(error), ConfigDict):  # made of a dict
            told[:2] = repr(given.to_dict()), "dict"
        return _wrong_type(place, Place(edit, variable), root, prefix, name, *told)
    if isinstance(error, SystemExit):
        return InputError(f"{place}: the file ends the program (SystemExit: {error.code})", "a return of config", edit)
    said = " ".join(_said(error).split())
    return InputError(f"{place}: {type(error).__name__}: {said[:1000]}", "a config file that runs", edit)


def _said(error: BaseException) -> str:
    """The exception's message; a config file's own exception class may fail to give one."""
    try:
        return str(error)
    except Exception:
        return ""


def _same_file(name: str, file: Path) -> bool:
    return os.path.realpath(name) == os.path.realpath(file)


def _assigned(error: BaseException) -> Any:
    """The value that was assigned to the field; None where it was only read."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_name in ("__setattr__", "__setitem__") and isinstance(
            frame.f_locals.get("self"), ConfigDict
        ):
            return frame.f_locals.get("value")
    return None


def _names_in(error: BaseException, variables: dict[str, Any]) -> tuple[ConfigDict, str, str] | None:
    """The tree in which a field was looked for, the dotted prefix of the section where that was, and the tree's name.

    Args:
      error: raised by the tree.
      variables: of the config file's frame.
    """
    owners = [f.f_locals.get("self") for f, _ in traceback.walk_tb(error.__traceback__)]
    section = next((o for o in reversed(owners) if isinstance(o, ConfigDict)), None)
    if section is None:
        return None
    found = None
    for variable, tree in variables.items():
        prefix = _path_to(tree, section) if isinstance(tree, ConfigDict) else None
        if prefix:  # not the section itself: a longer name says more
            return tree, prefix, variable
        if prefix is not None:
            found = section, "", variable
    return found or (section, "", "config")


def _path_to(tree: ConfigDict, section: ConfigDict, prefix: str = "") -> str | None:
    if tree is section:
        return prefix
    inner = ((key, tree[key]) for key in tree if isinstance(tree[key], ConfigDict))
    return next((p for k, v in inner if (p := _path_to(v, section, f"{prefix}{k}.")) is not None), None)


def _wrong_type(
    place: str, line_of: Place, root: ConfigDict, prefix: str, name: str, value: str, given: str, wanted: str
) -> InputError:
    """A value of another type than the field's."""
    quoted = repr(value) if given == "str" else value
    field = f"{prefix}{name}"
    example, expected = str(get(root, field)), f"a value of type {wanted}"
    if wanted == "tuple":
        example, expected = f"({quoted},)", "a tuple: the comma makes it one"
    elif wanted == "str":
        example, expected = repr(value), "a string"
    elif wanted in ("int", "float"):
        try:
            number = float(value)
            example = f"{number:g}" if wanted == "float" else str(int(number)) if number == int(number) else example
        except (ValueError, OverflowError):
            pass
    return InputError(f"{place}: {field} is {quoted}, of type {given}", expected, f"{line_of(field)} = {example}")
