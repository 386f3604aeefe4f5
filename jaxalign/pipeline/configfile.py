"""From a config file and the command line's overrides to one locked configuration."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxalign.errors import InputError
from jaxalign.pipeline.mistakes import broken, no_flag
from jaxalign.pipeline.overrides import override


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
    """Separates the flags of config fields from the rest, in order.

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
    """Lets a config file import its neighbours, as a script may; their modules are dropped afterwards."""
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
