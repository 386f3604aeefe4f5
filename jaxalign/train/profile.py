"""Where the time of a few steps goes: a trace for a profiler's viewer, and a line for each phase on the terminal."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from jaxalign.parallel.processes import say

T = TypeVar("T")
SKIPPED = 2  # steps before the first that is traced: they compile


class Profile:
    """Traces `steps` steps of a run; without steps it does nothing.

    Between the traced steps' phases the host waits for the device, so that each phase holds its own work; the steps
    around them are not touched.

    Args:
      run: the run's directory object; traces of a run in an object store go to a local folder.
      steps: how many; 0 for none.
      start: steps already done.
    """

    def __init__(self, run: Any, steps: int, start: int):
        self._run = run
        self._first, self._last = start + SKIPPED + 1, start + SKIPPED + steps
        self._wanted, self._active, self._done = steps > 0, False, start
        self._seconds: dict[str, float] = {}
        self._directory = ""

    def over(self, batches: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        """The batches (index, batch), with the time that the loop waits for each; traces begin and end here."""
        source = iter(batches)
        while True:
            if self._wanted and self._done + 1 == self._first:
                self._begin()
            with self.phase("waiting for data"):
                item = next(source, None)
            if item is None:
                break
            yield item
            self._done = item[0] + 1
            if self._done == self._last:
                self.close()
        self.close()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[list[Any]]:
        """Counts the block's time under a name; arrays that it appends to the list are waited for."""
        results: list[Any] = []
        if not self._active:
            yield results
            return
        started = time.perf_counter()
        with jax.profiler.TraceAnnotation(name):
            yield results
            jax.block_until_ready(results)
        self._count(name, time.perf_counter() - started)

    def split(self, name: str, parts: Mapping[str, float]) -> None:
        """Shows parts of a phase, measured elsewhere, in lines of their own.

        Args:
          name: of the phase, of this very step.
          parts: seconds by name.
        """
        for part, seconds in parts.items():
            self._count(f"{name}: {part}", seconds)
            self._count(name, -seconds)

    def _count(self, name: str, seconds: float) -> None:
        if self._active:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def close(self) -> None:
        """Ends a trace: after the last of its steps, or where the run ends before it."""
        if self._active:
            self._end(max(self._done, self._first))

    def _begin(self) -> None:
        remote = self._run.remote
        self._directory = tempfile.mkdtemp(prefix="jaxalign-profile-") if remote else str(self._run.path / "profile")
        jax.profiler.start_trace(self._directory)
        self._active, self._started = True, time.perf_counter()

    def _end(self, done: int) -> None:
        total, steps = time.perf_counter() - self._started, done - self._first + 1
        self._active = self._wanted = False
        jax.profiler.stop_trace()
        phases = dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
        phases["the rest"] = max(total - sum(phases.values()), 0.0)
        say(
            f"profile of steps {self._first} to {done}: {total / steps:.3f} s a step; the trace is in {self._directory}"
        )
        for name, seconds in phases.items():
            say(f"  {name:<20} {seconds / steps:8.3f} s {seconds / total:6.1%}")
