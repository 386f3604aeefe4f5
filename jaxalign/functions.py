"""Loading a user's functions by name, "package.module:function" or "file.py:function", and reporting their errors."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError

OURS = {__file__}  # files that call users' functions: their frames are left out of tracebacks
_LONGEST = 1000  # characters shown of an exception's message


def is_name(text: Any) -> bool:
    """Whether a field's value names a function.

    >>> is_name("file.py:loss"), is_name("sigmoid"), is_name(None)
    (True, False, False)
    """
    return isinstance(text, str) and ":" in text


def module_file(name: str) -> str:
    """The source file of "package.module:function" or "file.py:function"; the name itself where it is not found."""
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        return module
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # importing a parent package may raise; `load_function` reports that
        spec = None
    return spec.origin if spec and spec.origin else name


def load_function(name: str, field: str = "rewards.function", what: str = "reward") -> Callable[..., Any]:
    """Finds a function by "package.module:function" or "file.py:function".

    Args:
      name: a module that can be imported, or a file's path from the working directory; then ":" and the function.
      field: of the configuration, that holds the name, for messages.
      what: the function is, for messages.

    Returns:
      The function.

    Raises:
      InputError: no such file, module or function; it names the nearest that there is.

    >>> load_function("math:fsum")([0.5, 0.25])
    0.75
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise InputError(
            f"{field} is {name!r}",
            "module:function or file.py:function",
            f"--config.{field}={name.rstrip(':')}:{what}",
        )
    module = (_load_file if where.endswith(".py") else _import)(where, attribute, field, what)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.0)
        raise InputError(
            f"no function {attribute!r} in {where}",
            f"one of {', '.join(sorted(names)[:10])}" if names else "a function in it",
            f"--config.{field}={where}:{near[0] if near else what}",
        )
    return function


def _load_file(where: str, attribute: str, field: str, what: str) -> Any:
    path = Path(where).expanduser()
    if not path.is_file():
        files = [str(f) for f in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(where, files, n=1, cutoff=0.0)
        raise InputError(
            f"no file {where!r} in {Path.cwd()}",
            f"a Python file with the {what} function",
            f"--config.{field}={near[0] if near else f'{what}s.py'}:{attribute}",
        )
    name = f"jaxalign_{what}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look their module up
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file that calls sys.exit must not end the run as if it were done
        del sys.modules[name]
        raise raised(
            error, spec.origin or where, f"{where}, read for {attribute!r},", "a file that Python runs"
        ) from error
    return module


def _import(where: str, attribute: str, field: str, what: str) -> Any:
    try:
        return importlib.import_module(where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
        theirs = [f for f in frames if f not in OURS and "importlib" not in f]
        if theirs or isinstance(error, SyntaxError):  # the module exists; it or one of its imports fails
            file = (error.filename if isinstance(error, SyntaxError) else theirs[-1]) or ""
            who = f"{where}, imported for {attribute!r},"
            raise raised(error, file, who, "a module that Python imports") from error
        path = Path(*where.split(".")).with_suffix(".py") if where.strip(".") else Path(f"{what}s.py")
        fix = f"{path}:{attribute}" if path.is_file() else f"FILE.py:{attribute}"
        raise InputError(
            f"no module {where!r}", "a module on Python's path, or a file", f"--config.{field}={fix}"
        ) from error


def raised(error: BaseException, file: str, who: str, expected: str) -> InputError:
    """An exception in a user's code as an InputError with the user's part of the traceback.

    Args:
      error: what was raised.
      file: the user's; frames before the first one in it are ours.
      who: raised it.
      expected: instead.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    theirs = [i for i, frame in enumerate(frames) if frame.filename == file]
    frames = frames[theirs[0] :] if theirs else [frame for frame in frames if frame.filename not in OURS][-1:]
    if isinstance(error, SyntaxError) and error.filename == file:  # it has no frame in the traceback
        place, shown = f"{file}:{error.lineno}", [f"{file}:{error.lineno}: {(error.text or '').strip()}"]
    else:
        last = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1] if frames else None)
        place = f"{last.filename}:{last.lineno}" if last else file or "it"
        shown = [f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-8:]]
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)
    except Exception:  # the exception's own __str__ fails
        message = ""
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]}... ({len(message):,} characters)"
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return InputError("\n            ".join([f"{who} raised {said}", *shown]), expected, f"correct {place}")


def check_call(function: Callable[..., Any], name: str, form: str, *args: Any, **keywords: Any) -> Callable[..., Any]:
    """Checks a function's signature without calling it, and returns the function.

    Args:
      function: a user's.
      name: by which messages call it.
      form: how it is called, as text.
      args: as many as it will get.
      keywords: by the names that it will get.

    Raises:
      InputError: its signature does not take these.

    >>> check_call(max, "x", "x(a)", 1) is max  # a builtin does not tell
    True
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin does not tell
        return function
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise InputError(f"{name} is {called}{signature}: {error}", form, f"def {form}") from error
    return function
