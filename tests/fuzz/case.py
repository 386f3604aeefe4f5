"""A case of the fuzz campaign: a bad input, what is to be said of it, and the verdict on what was said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# What may be expected of a case.
REFUSED = "refused"  # exit status 2 and the three lines: found, expected, fix
RUNS = "runs"  # exit status 0: it only looks bad
WARNS = "warns"  # exit status 0, and the words are said
SOUND = "sound"  # either: what is accepted must end well (finite weights), what is refused must say why
STATUSES = {REFUSED: (2,), RUNS: (0,), WARNS: (0,), SOUND: (0, 1, 2)}  # 1: it could not go on, and says why

# What a case can be found to be.
OK, TRACEBACK, HANG, SILENT, UNCLEAR, OVERZEALOUS, DIED, WRONG = VERDICTS = (
    "ok",
    "traceback",
    "hang",
    "silent acceptance",
    "unclear",
    "refused a good input",
    "died",
    "wrong result",
)

LONGEST = 6000  # characters of a refusal: more is a dump, not a message


class Case(NamedTuple):
    """One bad input."""

    group: str  # the kind of input
    name: str  # unique in its group
    make: Callable[[Place], list[str] | Outcome]  # writes the input; gives a command's arguments, or what it ran did
    expect: str = REFUSED
    words: tuple[str, ...] = ()  # the answer names these; "a|b" is either
    after: Callable[[Place, int], str] | None = None  # looks at results, by the exit status: what is wrong, or ""
    limit: float = 60.0  # seconds

    @property
    def title(self) -> str:
        """The name that the command line takes."""
        return f"{self.group}/{self.name}"


class Place(NamedTuple):
    """Where a case may write, and what it may read."""

    here: Path  # empty, and the working directory
    world: Path  # good inputs, see `tests.fuzz.world`; not to be changed


class Outcome(NamedTuple):
    """What a command did."""

    status: int | None  # exit status; None: an exception came out, or the process is gone
    text: str  # all that was printed, with the traceback
    seconds: float
    ended: str = ""  # "hang" or "died" where the process had to be ended, or ended
    complaint: str = ""  # what is wrong with the results


_REFUSAL = re.compile(r"^\s*found: +(\S.*?)^\s*expected: +(\S.*?)^\s*fix: +(\S.*)", re.MULTILINE | re.DOTALL)
_TRACE = re.compile(r"Traceback \(most recent call last\)|^Fatal Python error|Segmentation fault", re.MULTILINE)


def judge(case: Case, outcome: Outcome) -> tuple[str, str]:
    """The verdict on a case, and why.

    Returns:
      One of `VERDICTS`, and a line; "" for what is well.
    """
    if outcome.ended:
        return (HANG if outcome.ended == "hang" else DIED), f"after {outcome.seconds:.0f} s"
    if outcome.status is None or _TRACE.search(outcome.text):
        return TRACEBACK, outcome.text.strip().splitlines()[-1][:300] if outcome.text.strip() else "no word"
    refusal = _REFUSAL.search(outcome.text)
    if outcome.status not in (0, *STATUSES[case.expect], 2):
        return UNCLEAR, f"exit status {outcome.status}"
    if outcome.status != 0:
        if refusal is None:
            return UNCLEAR, f"exit status {outcome.status} without found, expected, fix"
        if len(refusal[0]) > LONGEST:
            return UNCLEAR, f"a message of {len(refusal[0])} characters"
    if outcome.status not in STATUSES[case.expect]:
        found = refusal[1].strip() if refusal else ""
        return (SILENT, "exit status 0") if outcome.status == 0 else (OVERZEALOUS, found[:300])
    if outcome.complaint:
        return (SILENT if outcome.complaint.startswith("not finite") else WRONG), outcome.complaint
    if case.words and (outcome.status != 0 or case.expect == WARNS):
        said = (refusal[0] if refusal else outcome.text).lower()
        missing = [w for w in case.words if not any(part.lower() in said for part in w.split("|"))]
        if missing:
            verdict = UNCLEAR if outcome.status != 0 else SILENT
            return verdict, f"does not name {', '.join(missing)}: " + (refusal[1].strip()[:200] if refusal else "")
    return OK, ""
