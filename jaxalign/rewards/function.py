"""Reward functions: a user's Python function as a scorer, with its arguments and return values checked."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from jaxalign.errors import InputError
from jaxalign.functions import OURS, raised
from jaxalign.rewards.samples import Samples

# The arguments of every reward function; data columns of these names are only in `records`.
ARGUMENTS = ("prompts", "completions", "records", "completion_ids", "finished", "step")
_FORM = f"reward(prompts, completions, *, {', '.join(ARGUMENTS[2:])}, **columns), or fewer of the keywords"
_LARGEST = 1e18  # of a score: its square, summed over a batch, still fits float32
OURS.add(__file__)
_NO_NUMBERS = "cSUMm"  # kinds of array types: complex, bytes, text, dates and durations


class _Takes(NamedTuple):
    """What a reward function can be called with, beside prompts and completions."""

    first: frozenset[str]  # the names it gives to those two
    named: frozenset[str]  # keywords by name
    needed: frozenset[str]  # those without a default
    everything: bool  # has **columns


def _signature(function: Callable[..., Any], name: str) -> _Takes:
    """Checks a reward function's signature.

    Raises:
      InputError: it cannot be called with prompts and completions, or yields.
    """
    if inspect.isclass(function):
        fix = f"made = {function.__name__}(...) in its file, and --config.rewards.function=FILE.py:made"
        raise InputError(f"{name} is a class", f"a function, {_FORM}", fix)
    for call in (function, _own_call(function)):
        if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
            raise InputError(f"{name} yields", "a function that returns a list of scores", "return [...]")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins may have no signature
        return _Takes(frozenset(), frozenset(), frozenset(), False)
    parameters = list(signature.parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = [p.name for p in places[:2]]
    rest = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in first]
    few = len(first) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
    out_of_reach = [p for p in places[2:] if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if few or out_of_reach or first[:1] == ["completions"] or first[1:] == ["prompts"]:
        code = _code(function)
        where = f", at {code.co_filename}:{code.co_firstlineno}" if code else ""
        raise InputError(
            f"{name} is {getattr(function, '__name__', type(function).__name__)}{signature}",
            _FORM,
            f"def {getattr(function, '__name__', 'reward')}(prompts, completions, **columns):{where}",
        )
    return _Takes(
        frozenset(first),
        frozenset(p.name for p in rest),
        frozenset(p.name for p in rest if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _code(function: Callable[..., Any]) -> Any:
    """The code of a function, of what it wraps, or of an object's `__call__`; None for a builtin."""
    plain = inspect.unwrap(getattr(function, "func", function))
    return getattr(plain, "__code__", None) or getattr(_own_call(plain), "__code__", None)


def _own_call(function: Callable[..., Any]) -> Any:
    """The `__call__` of an object's class."""
    return getattr(type(function), "__call__", None)  # noqa: B004  the method, not whether there is one


class FunctionScorer:
    """Calls a reward function and checks what it gives back.

    reward(prompts, completions, *, records, completion_ids, finished, step, **columns) -> list[float | None]

    `columns` are the data's other columns, a list with one entry per completion (None where a record lacks it).  A
    function gets the keywords that its signature names, all of them with `**columns`.  It may be `async`.
    """

    def __init__(self, function: Callable[..., Any], name: str = "the reward function"):
        """
        Args:
          function: the reward.
          name: by which messages call it.

        Raises:
          InputError: it cannot be called like that.
        """
        self.function, self.name = function, name
        self._takes = _signature(function, name)
        self._known: frozenset[str] = frozenset()  # columns that the data has, if not in every batch

    @property
    def needs(self) -> frozenset[str]:
        """Columns without which the function cannot be called."""
        return self._takes.needed - set(ARGUMENTS)

    def expect(self, columns: Iterable[str]) -> None:
        """Checks, before training, that the data has the columns that the function needs.

        Args:
          columns: of the data; those that a batch lacks are given as None for each completion.

        Raises:
          InputError: naming what is missing.
        """
        self._known = frozenset(columns)
        if lacking := sorted(self.needs - self._known):
            near = difflib.get_close_matches(lacking[0], [*self._known, *ARGUMENTS[2:]], n=1, cutoff=0.0)
            raise InputError(
                f"{self.name} needs {', '.join(lacking)}, which the data has not",
                f"columns of the data ({', '.join(sorted(self._known)) or 'it has none'}), or of "
                f"{', '.join(ARGUMENTS[2:])}",
                f"{near[0]} in place of {lacking[0]}, or {lacking[0]}=None for one that may be missing",
            )

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores in the order of the samples.

        Raises:
          InputError: not a list of one number or None per completion, or a number that is not finite or too large.
        """
        columns = {name for record in samples.records for name in record.columns}
        if self.needs - columns - self._known:
            self.expect(columns)
        columns = (columns | self.needs) - set(ARGUMENTS) - self._takes.first
        keywords: dict[str, Any] = {c: [r.columns.get(c) for r in samples.records] for c in sorted(columns)}
        keywords |= {name: getattr(samples, name) for name in ARGUMENTS[2:]}
        if not self._takes.everything:
            keywords = {name: value for name, value in keywords.items() if name in self._takes.named}
        try:
            result = self.function(samples.prompts, samples.completions, **keywords)
            if inspect.isawaitable(result):
                result = _wait(result)
        except (InputError, MemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit(0) in a reward must not end the run as if it had finished
            count = len(samples.completions)
            code = _code(self.function)
            raise raised(
                error,
                code.co_filename if code else "",
                f"{self.name}, at step {samples.step} on {count} completions,",
                _expected(count),
            ) from error
        return self._checked(result, samples)

    def _checked(self, result: Any, samples: Samples) -> list[float | None]:
        count = len(samples.completions)
        expected = _expected(count)
        try:
            length = len(result)
        except Exception:  # no length: a number, None, a generator, an array without dimensions
            length = None
        if isinstance(result, (str, bytes, Mapping, AbstractSet)) or length is None:  # a set has lost the order
            raise InputError(
                f"{self.name} returned {type(result).__name__}", expected, f"return a list from {self.name}"
            )
        if length != count:
            raise InputError(f"{self.name} returned {length} values", expected, f"one value each in {self.name}")
        return [self._number(value, i, samples) for i, value in enumerate(result)]

    def _number(self, value: Any, i: int, samples: Samples) -> float | None:
        if value is None:
            return None
        number = _real(value)
        if not abs(number) <= _LARGEST:
            record = samples.records[i]
            raise InputError(
                f"{self.name} gave {_shown(value)} for record {record.index} ({record.source}:{record.line}), "
                f"completion {samples.completions[i][:80]!r}",
                f"a finite number of at most {_LARGEST:g} either way, or None where it does not apply",
                f"handle this completion in {self.name}",
            )
        return number


def _real(value: Any) -> float:
    """A value as a float; NaN for what is not a real number, infinity for what overflows."""
    if isinstance(value, str) or (isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)):
        return math.nan
    if getattr(value, "ndim", 0) or getattr(getattr(value, "dtype", None), "kind", "f") in _NO_NUMBERS:
        return math.nan
    try:
        return float(value) if isinstance(value, numbers.Real) or hasattr(value, "__float__") else math.nan
    except OverflowError:
        return math.inf
    except Exception:  # whatever a type of their own raises
        return math.nan


def _shown(value: Any) -> str:
    """A shortened `repr`, also of a value whose `repr` fails."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters of {type(value).__name__})"


def _expected(count: int) -> str:
    return f"a list of {count} numbers (or None), one per completion"


def _wait(awaitable: Any) -> Any:
    """Runs an awaitable to completion, also inside a running event loop (a notebook's)."""

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
