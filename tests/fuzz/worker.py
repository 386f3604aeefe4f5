"""Runs cases one after the other in this process, so that what a command imports and compiles is paid for once.

`python -m tests.fuzz.worker DIRECTORY SEED` reads titles of cases from its standard input, a line each, and answers
each by a line of JSON: the fields of `Outcome`. The pool ends a process that hangs and starts another.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.case import Case, Outcome, Place
from tests.fuzz.inside import call
from tests.fuzz.world import build, not_finite

MEMORY = 12 << 30  # bytes of private memory: an absurd size must fail here, not take the machine along


def run(case: Case, here: Path, world: Path) -> Outcome:
    """One case, from its input to what the command said and did."""
    if os.path.ismount(here / "out"):  # the disk of a case that did not come to its end
        subprocess.run(["umount", "--lazy", str(here / "out")], check=True)
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    place, before = Place(here, world), Path.cwd()
    os.chdir(here)
    try:
        argv = case.make(place)
        if isinstance(argv, Outcome):  # it ran processes of its own
            return argv
        done, started = set(here.glob("out*/**/DONE")), time.monotonic()
        status, text = call(argv)
        seconds = time.monotonic() - started
        complaint = ""
        if status == 0:
            complaint = not_finite(here)
        elif status == 2 and not case.after and set(here.glob("out*/**/DONE")) - done:
            complaint = "a refused run says that it is done"
        if status in (0, 1, 2) and case.after and not complaint:
            complaint = case.after(place, status)
        return Outcome(status, text, seconds, "", complaint)
    finally:
        os.chdir(before)


def main() -> None:
    """Answers titles until there are no more."""
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable(open(directory / "crash.txt", "w"))  # noqa: SIM115  open as long as the process is there
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tests.fuzz.cases import all_cases

    cases = {case.title: case for case in all_cases(seed)}
    world = build(directory / "world")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case = cases[line.strip()]
        try:
            outcome = run(case, directory / "here", world)
        except BaseException:  # the case itself could not be made
            outcome = Outcome(None, "the case is broken\n" + traceback.format_exc(), 0.0)
        print(json.dumps(outcome._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    main()
