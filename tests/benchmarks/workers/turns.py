"""A worker's side of the rounds: it works when it is told to, and says what that took. Standard library only.

The worker prints one JSON line at a time on the stdout it was started with: `ready` once it is compiled and warm, then
one line for each turn; `go` on stdin starts a turn, `stop` ends the process. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """Reads the worker's orders and takes the time."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        with open(sys.argv[1], encoding="utf-8") as file:
            spec = json.load(file)
        self.case: dict[str, Any] = spec["case"]
        self.options: dict[str, Any] = spec["options"]
        self.directory: str = spec["directory"]  # of the case: records.json and model/
        self.scratch: str = spec["scratch"]  # of this worker alone
        self.threads: int = spec["threads"]
        self.steps: int = self.case["steps"]  # of a turn
        self.ready: dict[str, Any] = {"imports_gib": 0.0, "compile_seconds": None, "versions": {}}
        self._spawned = spec["spawned"]
        self._tokens = 0.0
        self._compile = None

    def records(self) -> list[dict[str, list[int]]]:
        """The case's records as token ids."""
        with open(f"{self.directory}/records.json", encoding="utf-8") as file:
            return json.load(file)

    def imported(self, *packages: str) -> None:
        """To be called when all is imported and nothing made yet.

        Args:
          packages: whose versions are part of the result.
        """
        from importlib.metadata import version

        self.ready["imports_gib"] = round(peak_gib(), 3)
        self.ready["versions"] = {name: version(name) for name in packages}

    def count_compilation(self) -> None:
        """Adds up the seconds that XLA compiles from now on."""
        import jax

        self._compile = 0.0

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self._compile += seconds

        jax.monitoring.register_event_duration_secs_listener(listen)

    def first_step(self) -> None:
        """To be called when the first step is done."""
        self.ready["first_step_seconds"] = round(time.time() - self._spawned, 3)
        self.ready["compile_seconds"] = None if self._compile is None else round(self._compile, 3)

    def after_step(self, step: int, tokens: Callable[[], float] | None = None) -> None:
        """To be called after each step; lets the process rest where a turn ends.

        Args:
          step: steps done.
          tokens: counts those of all steps so far, where they are not the same in each.
        """
        if step == 1:
            self.first_step()
        if step > 1 and step % self.steps == 0:
            self.turn(tokens)

    def turn(self, tokens: Callable[[], float] | None = None, **figures: Any) -> None:
        """Ends the turn under way, if there is one, and waits for the next. All work must be done when it is called.

        Args:
          tokens: counts those of all turns so far and of what came before them.
          figures: more to say of the turn that ends.
        """
        seconds, cpu = time.perf_counter(), cpu_seconds()
        done = tokens() if tokens else None
        if "first_step_seconds" in self.ready:
            self._say(event="ready", **self.ready)
            self.ready = {}
        else:
            said = {"steps": self.steps, "seconds": seconds - self._start, "cpu_seconds": cpu - self._start_cpu}
            if done is not None:
                said["tokens"] = done - self._tokens
            self._say(event="turn", **said, **figures)
        self._tokens = done or 0.0
        if sys.stdin.readline().strip() != "go":
            self._say(event="end", peak_gib=round(peak_gib(), 4))
            os._exit(0)  # threads of loaders and writers would keep the process
        self._start, self._start_cpu = time.perf_counter(), cpu_seconds()

    def _say(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def text(ids: list[int]) -> str:
    """Ids as words of the case's tokenizer."""
    return " ".join(f"w{i}" for i in ids)


def cpu_seconds() -> float:
    """CPU seconds of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_gib() -> float:
    """The most memory that this process has held, GiB."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="utf-8") as file:
            found = [line for line in file if line.startswith("VmHWM")]
        if found:
            return int(found[0].split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
