"""Errors about missing files of a shipped config give the preparation commands of its docstring."""

from __future__ import annotations

import ast
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxalign.config import get
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.keys import INPUTS, paths_in

_COMMANDS = ("bash ", "python ", ".venv/", "jaxalign ")


@contextlib.contextmanager
def first_told(config: str) -> Iterator[None]:
    """Adds a config file's preparation commands to errors about files that it names and that do not exist.

    Args:
      config: the file, as `--config` takes it.
    """
    try:
        yield
    except InputError as error:
        commands = first(config)
        if not commands or not any(path in error.found for path in _missing(config)):
            raise
        another = ", or --config.model.path=DIR_OR_HUB_ID" * ("model.path" in error.fields)
        raise InputError(error.found, error.expected, " && ".join(commands) + another) from error


def first(config: str) -> list[str]:
    """The commands under `first` in the docstring of a config file, in order.

    >>> first("configs/no_such_file.py")
    []
    """
    file = Path(config if os.path.exists(config) else config.rpartition(":")[0])
    if not file.is_file():
        return []
    try:
        note = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    except (OSError, ValueError, SyntaxError):
        return []
    block = re.search(r"^first((?: +\S.*\n?)+)", note, re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for line in (block[1] if block else "").splitlines()]
    return [line for line in lines if line.startswith(_COMMANDS)]


def _missing(config: str) -> list[str]:
    """Local paths that the config file itself names and that do not exist."""
    tree = load_config(config)
    parts = [tree, *(tree[key] for key in tree)]  # a stage's fields are a section's own
    paths = [path for part in parts for field in INPUTS for path in paths_in(get(part, field))]
    return [path for path in paths if path.count("/") > 1 and "://" not in path and not os.path.exists(path)]
