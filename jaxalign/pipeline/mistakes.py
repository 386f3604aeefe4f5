"""Mistakes in a configuration, in words: names that no field has, values of another type, files that break."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config import defaults, get, nearest_field
from jaxalign.errors import InputError
from jaxalign.ranges import ALGORITHMS

_NONE = object()


def no_field(config: ConfigDict, field: str, found: str, where: str = "") -> InputError:
    """What to say of a name that no field has: a stage's field without the stage, another algorithm's, or misspelt.

    Args:
      config: the whole tree.
      field: dotted name.
      found: the beginning of the message.
      where: the line of a config file; "": the name came as a flag.
    """

    def fix(name: str) -> str:
        return f"{where}: {name}" if where else f"--config.{name}=..."

    names = config.stages if "stages" in config else ()
    staged = [
        f"{stage}.{field}" for stage in names if stage in config and get(config[stage], field, _NONE) is not _NONE
    ]
    if staged:
        return InputError(found, f"the name of a stage before it: {', '.join(staged)}", fix(staged[0]))
    stage, _, rest = field.partition(".")
    section, own = (config[stage], rest) if stage in names and stage in config else (config, field)
    others = [name for name in ALGORITHMS if get(defaults(name), own, _NONE) is not _NONE] if own else []
    algorithm = get(section, "algorithm.name")
    if others and algorithm:
        return InputError(
            f"{found} for {algorithm}",
            f"{own} is a field of {' and '.join(others)}",
            f"{where}: without it" if where else f"without --config.{field}, or a config of defaults({others[0]!r})",
        )
    near = nearest_field(config, field)
    return InputError(found, f"the nearest name is {near}", fix(near))


_UNKNOWN_KEY = re.compile(r"""Key "(\w+)" does not exist|^'(\w+)'(\nDid you mean|$)""")
_WRONG_TYPE = re.compile(
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '([\w.]+)'> "
    r"and cannot be casted to type <class '([\w.]+)'>",
    re.DOTALL,
)


def broken(file: Path, error: Exception) -> InputError:
    """An exception in a user's config file, by the line in that file."""
    here = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _same_file(f.f_code.co_filename, file)]
    line = here[-1][1] if here else None
    if isinstance(error, SyntaxError) and _same_file(error.filename or "", file):
        line = error.lineno
    place = f"{file}:{line or '?'}"
    edit = f"line {line} of {file}" if line else f"edit {file}"
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    message = str(cause.args[0]) if cause.args else ""
    name_of = _names_in(error, here[-1][0].f_locals if here else {})
    if isinstance(error, (AttributeError, KeyError)) and name_of and (match := _UNKNOWN_KEY.search(message)):
        root, prefix = name_of
        field = prefix + (match[1] or match[2])
        return no_field(root, field, f"{place}: there is no field {field}", edit)
    if isinstance(error, TypeError) and name_of and (match := _WRONG_TYPE.search(message)):
        return _wrong_type(place, edit, *name_of, *match.groups())
    return InputError(f"{place}: {type(error).__name__}: {' '.join(message.split())}", "a config file that runs", edit)


def _same_file(name: str, file: Path) -> bool:
    return os.path.realpath(name) == os.path.realpath(file)


def _names_in(error: Exception, variables: dict[str, Any]) -> tuple[ConfigDict, str] | None:
    """The tree in which a field was looked for, and the dotted prefix of the section where that was.

    Args:
      error: raised by the tree.
      variables: of the config file's frame.
    """
    owners = [f.f_locals.get("self") for f, _ in traceback.walk_tb(error.__traceback__)]
    section = next((o for o in reversed(owners) if isinstance(o, ConfigDict)), None)
    if section is None:
        return None
    for tree in variables.values():
        prefix = _path_to(tree, section) if isinstance(tree, ConfigDict) else None
        if prefix:  # not the section itself: a longer name says more
            return tree, prefix
    return section, ""


def _path_to(tree: ConfigDict, section: ConfigDict, prefix: str = "") -> str | None:
    if tree is section:
        return prefix
    inner = ((key, tree[key]) for key in tree if isinstance(tree[key], ConfigDict))
    return next((p for k, v in inner if (p := _path_to(v, section, f"{prefix}{k}.")) is not None), None)


def _wrong_type(
    place: str, edit: str, root: ConfigDict, prefix: str, name: str, value: str, given: str, wanted: str
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
    return InputError(f"{place}: {field} is {quoted}, of type {given}", expected, f"{edit}: {field} = {example}")
