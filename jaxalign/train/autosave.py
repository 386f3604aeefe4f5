"""Checkpoints by time: how many minutes of training a hard kill may cost."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax

from jaxalign.parallel.processes import on_main, say


class Autosave:
    """Says when a checkpoint is due by time; the clock of process 0 decides for all processes.

    Asking another process waits for the device, so several processes do not ask at every step: each time they also
    agree on the step at which they ask again: by the pace of the last steps halfway to the save, or after a sixteenth
    of the minutes, so that steps that become slower do not make it late by much.
    """

    def __init__(
        self,
        minutes: float,
        start: int,
        against: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
          minutes: between two checkpoints; 0: never by time.
          start: steps done when training begins.
          against: asked on process 0 when one is due; what it answers is said once, and the minutes begin anew.
          clock: seconds.
        """
        self._seconds, self._against, self._clock, self._said = 60.0 * minutes, against, clock, False
        self._saved = self._looked = clock()
        self._step, self._next = start, start + 1

    def due(self, step: int) -> bool:
        """Whether to save after this step; every process calls it at every step and gets the same answer."""
        if not self._seconds or step < self._next:
            return False
        due, self._next = on_main(functools.partial(self._look, step))
        return due

    def _look(self, step: int) -> list:
        now = self._clock()
        pace = (now - self._looked) / (step - self._step)
        self._looked, self._step = now, step
        left = self._seconds - (now - self._saved)
        ahead = int(min(left / 2, self._seconds / 16) / max(pace, 1e-6)) if jax.process_count() > 1 else 0
        due = left <= 0 and not self._prevented()
        return [due, step + max(1, ahead)]

    def _prevented(self) -> bool:
        if not (reason := self._against()):
            return False
        if not self._said:
            say(f"warning: {reason}")
        self._saved, self._said = self._looked, True
        return True

    def saved(self, step: int) -> None:
        """A checkpoint of this step is written, for whatever reason: the minutes begin anew."""
        self._saved, self._next = self._clock(), step + 1
