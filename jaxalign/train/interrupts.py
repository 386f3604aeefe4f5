"""Requests to stop: SIGTERM and Ctrl-C become a save and an orderly end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

import jax


class Interrupted(SystemExit):
    """The run was asked to stop and saved its state: the process's status is 128 + the signal, 143 or 130.

    Not 0: the run is not done; a scheduler that restarts failed jobs (Kubernetes, Slurm) restarts it.
    """


_at_once = False  # a second Ctrl-C came: later errors are consequences of it


def at_once(error: BaseException | None) -> bool:
    """Whether an error is a Ctrl-C, or came of one: libraries make other errors of it on the way."""
    while error is not None and not _at_once:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return _at_once


class StopRequests:
    """Watches for SIGTERM and SIGINT while training runs.

    In a single process both set a mark that the loop reads after each step; a second SIGINT interrupts at once.  In a
    run of several processes the runtime takes SIGTERM (a preemption notice on any host) and all agree on the step at
    which to stop; SIGINT keeps its usual meaning there, since not every process gets it.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._old: dict[int, object] = {}
        self._told_elsewhere = sys.unraisablehook
        self._agreed = jax.distributed.is_initialized()

    def __enter__(self) -> StopRequests:
        global _at_once
        _at_once = False
        if not self._agreed and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
            self._told_elsewhere, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._old:
            sys.unraisablehook = self._told_elsewhere

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            global _at_once
            _at_once = True
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGINT:  # no print: it may have been interrupted itself
            begin = b"\n" if os.isatty(2) else b""  # the progress bar's line, and the terminal's ^C, have no end
            os.write(2, begin + b"stopping after this step, with a save; Ctrl-C again: at once\n")

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        """Says nothing of a Ctrl-C that landed where Python drops exceptions, such as a callback of the collector."""
        if not (_at_once and isinstance(what.exc_value, KeyboardInterrupt)):
            self._told_elsewhere(what)

    def at(self, step: int) -> int:
        """The signal to stop for after this step, 0 for none; every process calls it at every step.

        Raises:
          KeyboardInterrupt: a second Ctrl-C came, and its exception was lost.
        """
        if _at_once:
            raise KeyboardInterrupt
        if self._agreed:
            from jax.experimental import multihost_utils

            return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0
        return self._signal
