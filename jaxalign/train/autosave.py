"""Checkpoints by time: how many minutes of training a hard kill may cost."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax

from jaxalign.parallel.processes import on_main


class Autosave:
    """Says when a checkpoint is due by time; the clock of process 0 decides for all processes.

    Asking another process waits for the device, so several processes do not ask at every step: each time they also
    agree on the step at which they ask again: by the pace of the last steps halfway to the save, or after a sixteenth
    of the minutes, so that steps that become slower do not make it late by much.
    """

    def __init__(self, minutes: float, start: int, clock: Callable[[], float] = time.monotonic):
        """
        Args:
          minutes: between two checkpoints; 0: never by time.
          start: steps done when training begins.
          clock: seconds.
        """
        self._seconds, self._clock = 60.0 * minutes, clock
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
        return [left <= 0, step + max(1, ahead)]

    def saved(self, step: int) -> None:
        """A checkpoint of this step is written, for whatever reason: the minutes begin anew."""
        self._saved, self._next = self._clock(), step + 1
