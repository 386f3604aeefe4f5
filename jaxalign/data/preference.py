"""Preference labels: which codes of a column mean that the first answer is better, the second, or a tie.

A source maps them as `"preference": {"column": "label", "first": 0, "second": 1, "tie": 2}`, where `first` means the
column mapped to `chosen`; each may be a list of codes.  `"preference": "label"` is short for 1 and 2, without a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SIDES = ("first", "second", "tie")
_LABELS = re.compile(r"prefer|label|winner|choice|better|best|verdict|vote|judg", re.IGNORECASE)
_CODES = frozenset(("-1", "0", "0.5", "1", "1.5", "2", "3", "a", "b", "model_a", "model_b", "tie", "first", "second"))
_TWINS = (("1", "2"), ("0", "1"), ("a", "b"))  # how neutral names of two answers end


def canonical(value: Any) -> str:
    """A code in canonical form: numbers by value, also from strings of digits; words in lower case.

    >>> canonical(1.0), canonical("1"), canonical(True), canonical("Model_A"), canonical(None)
    ('1', '1', 'true', 'model_a', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError, OverflowError):
        return str(value).strip().lower()[:60]


class UnknownCode(Exception):
    """A code that is neither first, second nor tie; its message is the code."""


class Codes(NamedTuple):
    """What the codes of a column mean."""

    column: str
    sides: dict[str, str]  # canonical code -> one of SIDES

    def winner(self, value: Any) -> int | None:
        """1 where the first answer is better, 2 where the second is, None where the label says neither.

        Raises:
          UnknownCode: where it is no known code.
        """
        code = canonical(value)
        if not code:
            return None
        if code not in self.sides:
            raise UnknownCode(code)
        return {"first": 1, "second": 2, "tie": None}[self.sides[code]]


def column_name(mapped: Any) -> str:
    """The data's column of an entry in a source's `columns`."""
    return mapped["column"] if isinstance(mapped, Mapping) else mapped


def codes_of(mapped: Any) -> Codes:
    """The codes of an entry `preference` in a source's `columns`, checked.

    Raises:
      ValueError: saying what is wrong with it.
    """
    if isinstance(mapped, str):
        return Codes(mapped, {"1": "first", "2": "second"})
    given = dict(mapped.items())
    column = given.pop("column", None)
    if not isinstance(column, str) or not column:
        raise ValueError(f"column is {column!r}, not a column's name")
    if strange := [key for key in given if key not in SIDES]:
        raise ValueError(f"{strange[0]!r} is none of column, {', '.join(SIDES)}")
    sides: dict[str, str] = {}
    for side, codes in given.items():
        for code in codes if isinstance(codes, (list, tuple)) else (codes,):
            known = sides.setdefault(canonical(code), side)
            if not isinstance(code, (str, int, float)) or not canonical(code):
                raise ValueError(f"{side} is {codes!r}, not a code or a list of codes")
            if known != side:
                raise ValueError(f"{code!r} is both {known} and {side}")
    if not {"first", "second"} & set(sides.values()):
        raise ValueError("no code for first or second")
    return Codes(column, sides)


def counter(name: str) -> tuple[str, str]:
    """A name with its number or letter replaced by #, and that number or letter.

    >>> counter("output_1"), counter("answerB"), counter("response_a_text"), counter("chosen")
    (('output_#', '1'), ('answer#', 'b'), ('response_#_text', 'a'), ('chosen', ''))
    """
    found = re.search(r"(?<![A-Za-z0-9])[012abAB](?![A-Za-z0-9])|(?<=[a-z])[012AB]$", name)
    return (f"{name[: found.start()]}#{name[found.end() :]}", found[0].lower()) if found else (name, "")


def twins(one: str, other: str) -> bool:
    """Whether two names differ only in a number or letter, so that they do not tell which is better.

    >>> twins("output_1", "output_2"), twins("answer_B", "answer_A"), twins("chosen", "rejected")
    (True, True, False)
    """
    (skeleton, a), (same, b) = counter(one), counter(other)
    return skeleton.lower() == same.lower() and tuple(sorted((a, b))) in _TWINS


def label_columns(rows: Iterable[Mapping[str, Any]], others: Iterable[str]) -> dict[str, Counter]:
    """Columns that may hold the preference, the likeliest first, each with the counts of its codes.

    Args:
      rows: a sample.
      others: columns that are known to hold something else.
    """
    known, values = set(others), {}
    for row in rows:
        for name, value in row.items():
            if name not in known and value is not None:
                values.setdefault(name, []).append(value)
    found = {}
    for name, held in values.items():
        if not all(isinstance(value, (str, int, float)) for value in held):
            continue
        if any(twins(name, other) for other in values):
            continue  # something of each answer
        codes = Counter(map(canonical, held))
        codes.pop("", None)
        named = bool(_LABELS.search(name))
        if codes and len(codes) <= 8 and (named or (len(codes) > 1 and codes.keys() <= _CODES)):
            found[name] = codes
    return dict(sorted(found.items(), key=lambda item: not _LABELS.search(item[0])))


def guessed_map(column: str, codes: Iterable[str], sides: tuple[str, str]) -> dict[str, Any]:
    """An entry `preference` as it may be meant, to be checked by whoever knows the data.

    Codes that the names of the two answers end in are theirs; else the lower code is the first answer.

    >>> guessed_map("winner", ["tie", "model_b", "model_a"], ("response_a", "response_b"))
    {'column': 'winner', 'first': 'model_a', 'second': 'model_b', 'tie': 'tie'}
    """
    left = sorted(codes, key=lambda code: (not _is_number(code), float(code) if _is_number(code) else 0.0, code))
    guess: dict[str, Any] = {"column": column}
    ends = [counter(side)[1] for side in sides]
    for side, end in zip(("first", "second"), ends, strict=True):
        own = [code for code in left if end and (code == end or code.endswith(f"_{end}"))]
        if own:
            guess[side] = own[0]
    for side in ("first", "second"):
        rest = [code for code in left if code not in guess.values() and "tie" not in code]
        if side not in guess and rest:
            guess[side] = rest[0]
    if ties := [code for code in left if code not in (guess.get("first"), guess.get("second"))]:
        guess["tie"] = ties[0] if len(ties) == 1 else ties
    return {key: _plain(value) if key != "column" else value for key, value in guess.items()}


def _is_number(code: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", code) is not None


def _plain(code: Any) -> Any:
    if isinstance(code, list):
        return [_plain(one) for one in code]
    return (float(code) if "." in code else int(code)) if _is_number(code) else code


def shown(codes: Mapping[str, int]) -> str:
    """Codes with how often they occur.

    >>> shown({"1": 5, "2": 7})
    '1 (5), 2 (7)'
    """
    ranked = sorted(codes.items(), key=lambda item: -item[1])
    return ", ".join(f"{code or 'null'} ({n})" for code, n in sorted(ranked[:8])) + (", ..." if len(ranked) > 8 else "")
