"""Runs cases one after the other in this process, so that what a command imports and compiles is paid for once.

`python -m tests.fuzz.worker DIRECTORY SEED` reads titles of cases from its standard input, a line each, and answers
each by a line of JSON: the fields of `Outcome`. The pool ends a process that hangs and starts another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.case import Case, Outcome, Place
from tests.fuzz.world import build, not_finite

MEMORY = 12 << 30  # bytes of private memory: an absurd size must fail here, not take the machine along


def run(case: Case, here: Path, world: Path) -> Outcome:
    """One case, from its input to what the command said and did."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    place, before = Place(here, world), Path.cwd()
    os.chdir(here)
    try:
        argv = case.make(place)
        started = time.monotonic()
        with _as_it_was(), _printed() as text:
            status = _main(argv)
        seconds = time.monotonic() - started
        complaint = "" if status != 0 else not_finite(here) or (case.after(place) if case.after else "")
        if status == 2 and any(here.glob("out*/**/DONE")) and not case.after:
            complaint = "a refused run says that it is done"
        return Outcome(status, text(), seconds, "", complaint)
    finally:
        os.chdir(before)


def _main(argv: list[str]) -> int | None:
    """The command's exit status, as a shell would see it; None where an exception comes out."""
    from jaxalign.cli import main

    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return None


@contextlib.contextmanager
def _as_it_was():
    """What a case changes in this process is forgotten: variables, warnings, signals, modules of its files."""
    environment, modules, path = dict(os.environ), set(sys.modules), list(sys.path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    show = warnings.showwarning
    try:
        with warnings.catch_warnings():
            yield
    finally:
        warnings.showwarning = show
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        here = os.getcwd()
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(here):
                del sys.modules[name]


@contextlib.contextmanager
def _printed():
    """All that is printed meanwhile, by Python or below it; gives a function that reads it."""
    with open("printed.txt", "w+b") as file:
        kept = os.dup(1), os.dup(2)
        streams = sys.stdout, sys.stderr
        sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), "utf-8", "backslashreplace", None, True)
        sys.stderr = io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), "utf-8", "backslashreplace", None, True)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        held: list[str] = []
        try:
            yield lambda: held[0]
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            held.append(file.read().decode("utf-8", "replace"))


def main() -> None:
    """Answers titles until there are no more."""
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory.parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
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
