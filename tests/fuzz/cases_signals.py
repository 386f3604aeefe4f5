"""Runs that are killed, stopped, or started twice, in processes of their own; then the same command again."""

from __future__ import annotations

import random
import signal
import time

from tests.fuzz.case import RUNS as GOES_ON
from tests.fuzz.case import Case, Outcome
from tests.fuzz.child import Child
from tests.fuzz.runs import ARGUMENTS, RUNS, STEPS, differs, directory, lay_out, made

LIMIT = 400.0
_WORDS = "Traceback (most recent call last)"


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `signals`."""
    found = []
    for run in RUNS:
        steps = [rng.randint(1, STEPS - 1) for _ in range(6)]
        plans = {
            f"kill-at-{steps[0]}": ((steps[0], (signal.SIGKILL,)),),
            f"kill-at-{steps[1]}-then-{steps[2]}": ((steps[1], (signal.SIGKILL,)), (steps[2], (signal.SIGKILL,))),
            f"kill-after-{rng.random():.2f}-of-the-start": ((0, (signal.SIGKILL,)),),
            f"term-at-{steps[3]}": ((steps[3], (signal.SIGTERM,)),),
            "term-at-the-start": ((0, (signal.SIGTERM,)),),
            f"interrupt-at-{steps[4]}": ((steps[4], (signal.SIGINT,)),),
            f"two-interrupts-at-{steps[5]}": ((steps[5], (signal.SIGINT, signal.SIGINT)),),
            f"many-interrupts-at-{steps[4]}": ((steps[4], (signal.SIGINT,) * 6),),
            f"term-and-interrupt-at-{steps[3]}": ((steps[3], (signal.SIGTERM, signal.SIGINT)),),
            f"term-and-kill-at-{steps[5]}": ((steps[5], (signal.SIGTERM, signal.SIGKILL)),),
            "interrupt-at-the-start": ((0, (signal.SIGINT, signal.SIGINT)),),
            f"kill-at-{STEPS}": ((STEPS, (signal.SIGKILL,)),),
        }
        for name, plan in plans.items():
            dice = rng.random()
            found.append(
                Case(
                    "signals",
                    f"{run}-{name}",
                    lambda p, r=run, s=plan, d=dice: _stopped(p, r, s, d),
                    GOES_ON,
                    limit=LIMIT,
                )
            )
        for name, function in (("two-at-once", _two_at_once), ("second-while-running", _second)):
            found.append(Case("signals", f"{run}-{name}", lambda p, r=run, f=function: f(p, r), GOES_ON, limit=LIMIT))
    return found


def _bad(text: str, outcome: Outcome) -> Outcome:
    return outcome._replace(complaint=text)


def _stopped(place, run, plan, dice) -> Outcome:
    """Stopped as planned, as often as planned, then run to the end."""
    made(place, run, "whole")
    lay_out(place.here, place.world, run)
    log = directory(place.here, run) / "metrics.jsonl"
    for step, signals in plan:
        child = Child(ARGUMENTS, here=place.here, pace=0.15)
        if step:
            child.until(step, log)
        else:
            time.sleep(1 + 6 * dice)
        for number in signals:
            child.send(number)
            time.sleep(0.05 * dice)
        outcome = child.end()
        if outcome.ended:
            return outcome
        if _WORDS in outcome.text:
            return outcome
        if outcome.status not in (0, *(-s for s in signals), *(128 + s for s in signals)):
            return _bad(f"exit status {outcome.status} after {[s.name for s in signals]}", outcome._replace(status=0))
    outcome = Child(ARGUMENTS, here=place.here).end()
    return _bad(differs(place, run), outcome) if outcome.status == 0 else outcome


def _second(place, run) -> Outcome:
    """A second process in the directory of a running one is refused, and does the first no harm."""
    made(place, run, "whole")
    lay_out(place.here, place.world, run)
    first = Child(ARGUMENTS, here=place.here, pace=2.0)
    first.until(1, directory(place.here, run) / "metrics.jsonl")
    second = Child(ARGUMENTS, here=place.here, name="second").end()
    one = first.end()
    return _both(place, run, one, second)


def _two_at_once(place, run) -> Outcome:
    """Two processes started together: one of them works, the other is refused, or finds all done."""
    made(place, run, "whole")
    lay_out(place.here, place.world, run)
    first = Child(ARGUMENTS, here=place.here, pace=0.3)
    second = Child(ARGUMENTS, here=place.here, pace=0.3, name="second")
    one, two = first.end(), second.end()
    return _both(place, run, *((one, two) if one.status == 0 else (two, one)))


def _both(place, run, one: Outcome, two: Outcome) -> Outcome:
    for outcome in (one, two):
        if outcome.ended or _WORDS in outcome.text:
            return outcome
    if one.status != 0:
        return one
    late = two.status == 0 and "done" in two.text  # it came when all was done; what it left is looked at below
    if not late and (two.status != 2 or "found:" not in two.text):
        return _bad(f"the second process ended with {two.status}: {two.text[-300:]}", one)
    return _bad(differs(place, run), one)
