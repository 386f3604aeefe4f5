"""From a config file and the command line's overrides to one locked configuration."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference

from jaxalign.errors import InputError
from jaxalign.pipeline.mistakes import broken, no_field, no_flag, no_section


def load_config(path: str, overrides: Iterable[tuple[str, str | None]] = ()) -> ConfigDict:
    """Runs `get_config()` of a Python file, applies overrides in order, and locks the result.

    Args:
      path: a Python file; after a colon, an argument: "configs/sft.py:tiny" calls `get_config("tiny")`.
      overrides: (dotted field, its value as text); see `override`.

    Returns:
      The configuration, locked.

    Raises:
      InputError: no such file, a file that does not give a configuration, or an override that does not fit.
    """
    config = _run(path)
    config.lock()
    seen: set[str] = set()
    for field, text in overrides:
        override(config, field, text, extend=field in seen)
        seen.add(field)
    return config


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Parts the flags of a config's fields from the rest, in order.

    `--config.a.b=1`, `--config.a.b 1`, `--config.a.b` (true) and `--noconfig.a.b` (false) are known.

    >>> split_overrides(["--config=f.py", "--config.seed=1", "--config.x.y", "2", "--noconfig.data.packing"])
    (['--config=f.py'], [('seed', '1'), ('x.y', '2'), ('data.packing', 'false')])
    """
    rest: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    i = 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        bare = name.lstrip("-")
        if not name.startswith("-") or not bare.startswith(("config.", "noconfig.")):
            rest.append(argv[i])
        elif bare.startswith("noconfig."):
            if equals:
                field = bare.removeprefix("noconfig.")
                raise InputError(argv[i][:200], f"{name} alone: it says false", f"--config.{field}={value[:200]}")
            overrides.append((bare.removeprefix("noconfig."), "false"))
        elif equals:
            overrides.append((bare.removeprefix("config."), value))
        elif i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            overrides.append((bare.removeprefix("config."), argv[i + 1]))
            i += 1
        else:
            overrides.append((bare.removeprefix("config."), None))
        i += 1
    return rest, overrides


def run_script(
    name: str, argv: Sequence[str], run: Callable[[Sequence[tuple[str, str | None]]], None], config: str = ""
) -> int:
    """What a script does with its arguments, overrides of its config's fields and nothing else.

    Args:
      name: what the script is called, for messages.
      argv: the arguments.
      run: what to do, given the overrides.
      config: the file whose fields may be overridden, for the page of help.

    Returns:
      The exit status: 0, or 2 where the input was wrong, which is then told without a traceback.
    """
    if {"-h", "--help"} & set(argv):
        print(f"usage: {name} [--config.field=value ...]" + (f"; the fields are those of {config}" if config else ""))
        return 0
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
    try:
        rest, overrides = split_overrides(argv)
        if rest and config:
            raise no_flag(load_config(config), rest, ["help"])
        if rest:
            raise InputError(f"argument {rest[0]!r}", "fields of its config alone", f"{name} --config.field=value")
        run(overrides)
    except InputError as error:
        print(f"{name}: the input cannot be used\n{error}", file=sys.stderr)
        return 2
    return 0


def override(config: ConfigDict, field: str, text: str | None, *, extend: bool = False) -> None:
    """Sets one field from the command line's text, by the type that the field has.

    - A number, a truth value (true/false) or a string, as it stands.  `None` empties a field that may be empty.
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
    if kind in (bool, object):  # object: a truth value or one of the field's words
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
        return _tuple(field, text)
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


def _tuple(field: str, text: str) -> tuple:
    value = _literal(text)
    if value is _NOT_A_LITERAL:
        if text.lstrip()[:1] in tuple("([{"):
            raise _unfit(field, text, "a Python or JSON literal", '[{"path": "a.jsonl"}] (quote it for the shell)')
        if parts := tuple(part.strip() for part in text.split(",") if part.strip()):
            return parts
        raise _unfit(field, text, "a value, several with commas, or None for none", "None")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


_NOT_A_LITERAL = object()


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


def _run(path: str) -> ConfigDict:
    """`get_config()` of the file."""
    file, argument = Path(path), None
    if not file.exists() and ":" in path:
        name, argument = path.rsplit(":", 1)
        file = Path(name)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        names = sorted(str(p) for p in folder.glob("*.py") if _is_config(p)) if folder.is_dir() else []
        near = difflib.get_close_matches(str(file), names, n=1, cutoff=0.0) or ["FILE.py"]
        raise InputError(f"no file {file}", "a Python file with get_config()", f"--config={near[0]}")
    if file.suffix in (".yaml", ".yml", ".json") and argument is None:
        from jaxalign.pipeline.configtext import read_config_text

        return read_config_text(file)
    spec = importlib.util.spec_from_file_location(f"jaxalign_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file", "a Python file with get_config()", "--config=FILE.py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(file.resolve().parent):
            spec.loader.exec_module(module)
            if not callable(getattr(module, "get_config", None)):
                raise InputError(f"{file} has no get_config()", "def get_config(): ... return config", f"edit {file}")
            arguments = () if argument is None else (argument,)
            _check_arguments(file, module.get_config, arguments)
            config = module.get_config(*arguments)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise broken(file, error) from error
    if not isinstance(config, ConfigDict) or not ("stages" in config or "algorithm" in config):
        raise InputError(
            f"get_config() of {file} returns {type(config).__name__}",
            "a tree that starts from jaxalign.config.defaults(...) or stages(...)",
            "return config" if config is None else 'config = defaults("dpo")',
        )
    return config


def _is_config(file: Path) -> bool:
    try:
        return file.is_file() and "def get_config(" in file.read_text(encoding="utf-8")  # a pipe would be waited for
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A config file may import its neighbours, as a script may; forgotten again, they hide no other file's."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and folder in Path(origin).parents and "site-packages" not in origin:
                del sys.modules[name]


def _check_arguments(file: Path, get_config: Callable, arguments: tuple[str, ...]) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise InputError(
                f"--config={file}:{arguments[0]}, but get_config() of {file} takes no argument",
                "the file alone",
                f"--config={file}",
            ) from None
        raise InputError(
            f"get_config{inspect.signature(get_config)} of {file} wants an argument",
            "one, as a text behind a colon",
            f"--config={file}:ARGUMENT",
        ) from None
