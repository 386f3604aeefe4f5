"""A command called in this process: its exit status and all that it printed, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings


def call(argv: list[str]) -> tuple[int | None, str]:
    """The command's exit status, as a shell would see it, and its output; None where an exception comes out."""
    with _as_it_was(), _printed() as text:
        status = _main(argv)
    return status, text()


def _main(argv: list[str]) -> int | None:
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
    """What a command changes in this process is forgotten: variables, warnings, signals, modules of its files."""
    environment, modules, path, here = dict(os.environ), set(sys.modules), list(sys.path), os.getcwd()
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
        os.chdir(here)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(here):
                del sys.modules[name]


@contextlib.contextmanager
def _printed():
    """All that is printed meanwhile, by Python or below it; gives a function that reads it."""
    name = os.path.join(os.path.dirname(os.getcwd()), "printed.txt")  # beside the case: its disk may be full
    open(name, "wb").close()
    with open(name, "a+b") as file:  # at its end: what loggers keep of an earlier case's streams writes there, too
        kept = os.dup(1), os.dup(2)
        streams = sys.stdout, sys.stderr
        own = [io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), "utf-8", write_through=True) for _ in kept]
        own[1].reconfigure(errors="backslashreplace")  # as Python's own
        sys.stdout, sys.stderr = own
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        held: list[str] = []
        try:
            yield lambda: held[0]
        finally:
            for stream in own:
                with contextlib.suppress(ValueError):
                    stream.flush()
            sys.stdout, sys.stderr = streams
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            held.append(file.read().decode("utf-8", "replace"))
