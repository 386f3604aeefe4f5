"""Rewards that are Python functions, found by name and checked at every call."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError
from jaxalign.rewards.samples import Samples

# What every reward function is called with; columns of the data by these names are found in `records` alone.
ARGUMENTS = ("prompts", "completions", "records", "completion_ids", "finished", "step")


def load_function(name: str) -> Callable[..., Any]:
    """Finds a function by "package.module:function" or "file.py:function".

    Args:
      name: a module that can be imported, or a file's path from the working directory; then ":" and the function.

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
            f"rewards.function is {name!r}",
            "module:function or file.py:function",
            f"--config.rewards.function={name.rstrip(':')}:reward",
        )
    module = _load_file(where, attribute) if where.endswith(".py") else _import(where, attribute)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.0)
        raise InputError(
            f"no function {attribute!r} in {where}",
            f"one of {', '.join(sorted(names)[:10])}" if names else "a function in it",
            f"--config.rewards.function={where}:{near[0] if near else 'reward'}",
        )
    return function


def _load_file(where: str, attribute: str):
    path = Path(where).expanduser()
    if not path.is_file():
        files = [str(f) for f in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(where, files, n=1, cutoff=0.0)
        raise InputError(
            f"no file {where!r} in {Path.cwd()}",
            "a Python file with the reward function",
            f"--config.rewards.function={near[0] if near else 'rewards.py'}:{attribute}",
        )
    name = f"jaxalign_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _raised(
            error, spec.origin or where, f"{where}, read for {attribute!r},", "a file that Python runs"
        ) from error
    return module


def _import(where: str, attribute: str):
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and not (where == error.name or where.startswith(error.name + ".")):
            raise  # the module is there; something that it imports is not
        file = Path(*where.split(".")).with_suffix(".py")
        fix = f"{file}:{attribute}" if file.is_file() else f"FILE.py:{attribute}"
        raise InputError(
            f"no module {where!r}", "a module on Python's path, or a file", f"--config.rewards.function={fix}"
        ) from error


class FunctionScorer:
    """Calls a reward function and checks what it gives back.

    reward(prompts, completions, *, records, completion_ids, finished, step, **columns) -> list[float | None]

    `columns` are the data's other columns, a list with one entry per completion (None where a record lacks it).  A
    function gets the keywords that its signature names, all of them with `**columns`.  It may be `async`.
    """

    def __init__(self, function: Callable[..., Any], name: str = "the reward function"):
        self.function, self.name = function, name
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores in the order of the samples.

        Raises:
          InputError: not a list of one number or None per completion, or a number that is not finite.
        """
        columns = {name for record in samples.records for name in record.columns} - set(ARGUMENTS)
        keywords: dict[str, Any] = {c: [r.columns.get(c) for r in samples.records] for c in sorted(columns)}
        keywords |= {name: getattr(samples, name) for name in ARGUMENTS[2:]}
        if not self._takes_all:
            keywords = {name: value for name, value in keywords.items() if name in self._takes}
        try:
            result = self.function(samples.prompts, samples.completions, **keywords)
            if inspect.isawaitable(result):
                result = _wait(result)
        except (InputError, MemoryError):
            raise
        except Exception as error:
            count = len(samples.completions)
            code = getattr(inspect.unwrap(self.function), "__code__", None)
            raise _raised(
                error,
                code.co_filename if code else "",
                f"{self.name}, at step {samples.step} on {count} completions,",
                _expected(count),
            ) from error
        return self._checked(result, samples)

    def _checked(self, result: Any, samples: Samples) -> list[float | None]:
        count = len(samples.completions)
        expected = _expected(count)
        if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__"):
            raise InputError(
                f"{self.name} returned {type(result).__name__}", expected, f"return a list from {self.name}"
            )
        if len(result) != count:
            raise InputError(f"{self.name} returned {len(result)} values", expected, f"one value each in {self.name}")
        return [self._number(value, i, samples) for i, value in enumerate(result)]

    def _number(self, value: Any, i: int, samples: Samples) -> float | None:
        if value is None:
            return None
        try:
            number = float(value) if isinstance(value, numbers.Real) or hasattr(value, "__float__") else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            record = samples.records[i]
            raise InputError(
                f"{self.name} gave {value!r} for record {record.index} ({record.source}:{record.line}), "
                f"completion {samples.completions[i][:80]!r}",
                "a finite number, or None where it does not apply",
                f"handle this completion in {self.name}",
            )
        return number


def _expected(count: int) -> str:
    return f"a list of {count} numbers (or None), one per completion"


def _raised(error: Exception, file: str, who: str, expected: str) -> InputError:
    """An exception of the user's own code as an error of input: where it was, and how it came there.

    Args:
      error: what was raised.
      file: the user's; frames before the first one in it are ours.
      who: raised it.
      expected: instead.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    theirs = [i for i, frame in enumerate(frames) if frame.filename == file]
    frames = frames[theirs[0] :] if theirs else frames[-1:]
    if isinstance(error, SyntaxError) and error.filename == file:  # it has no frame of its own
        place, shown = f"{file}:{error.lineno}", [f"{file}:{error.lineno}: {(error.text or '').strip()}"]
    else:
        last = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
        place = f"{last.filename}:{last.lineno}"
        shown = [f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-8:]]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return InputError("\n            ".join([f"{who} raised {said}", *shown]), expected, f"correct {place}")


def _wait(awaitable: Any) -> Any:
    """Runs an awaitable to its end, whether or not a loop (a notebook's) is already running."""

    async def run():
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    outcome: list[Any] = []

    def elsewhere():
        try:
            outcome.extend((True, asyncio.run(run())))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    good, value = outcome
    if not good:
        raise value
    return value
