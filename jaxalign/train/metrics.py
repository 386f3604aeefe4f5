"""Where a run's figures go: `metrics.jsonl`, the trackers, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from jaxalign.disk import write_whole, writing
from jaxalign.parallel.processes import is_main, say
from jaxalign.train.rundir import DAMAGED, RunDir
from jaxalign.train.trackers import Tracker, start_trackers


class Writer:
    """Writes rows of figures; on processes other than 0, nothing.

    A row of `metrics.jsonl` is `{"step": N, "time": seconds since 1970, name: value, ...}`, N batches done.
    """

    def __init__(self, run: RunDir, cfg: Any, *, start: int, config: Mapping[str, Any]):
        """
        Args:
          run: the run's directory.
          cfg: the `logging` section.
          start: the step that the run resumes from; rows of later steps, left by a crash, are cut.
          config: the whole configuration, for the trackers.
        """
        self._run = run
        self._trackers: list[Tracker] = []
        self._file: IO[str] | None = None
        if not is_main():
            return
        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            cut_back(run, start)
            self._open(run, cfg, start, config)

    def _open(self, run: RunDir, cfg: Any, start: int, config: Mapping[str, Any]) -> None:
        if run.remote:  # objects cannot be appended to: the whole file is written at each flush
            self._lines = run.metrics.read_text() if run.metrics.exists() else ""
        else:
            self._file = open(os.fspath(run.metrics), "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._trackers = start_trackers(run, cfg, start, config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; values that are not finite become null."""
        if not is_main():
            return
        finite = {k: (float(v) if math.isfinite(v) else None) for k, v in sorted(values.items())}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n"
        with writing(self._run.metrics):
            if self._file is not None:
                self._file.write(line)
                self._file.flush()
            else:
                self._lines += line
        for tracker in self._trackers:
            tracker.add(step, finite)

    def flush(self) -> None:
        """Makes sure that what was written survives a crash; called before each checkpoint."""
        if not is_main():
            return
        with writing(self._run.metrics):
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
            else:
                self._run.metrics.write_text(self._lines)

    def close(self) -> None:
        """Writes what is left."""
        with contextlib.ExitStack() as last:  # each of them, even if others fail
            for tracker in self._trackers:
                last.callback(tracker.close)
            if self._file is not None:
                last.enter_context(writing(self._run.metrics))
                last.callback(self._file.close)
            self.flush()


def cut_back(run: RunDir, step: int) -> None:
    """Drops the rows after `step`, and a last row that a crash cut short."""
    if not run.metrics.exists():
        return
    data = run.metrics.read_bytes()
    rows = list(_rows(data))
    kept = b"".join(line for line, row in rows if row is not None and row["step"] <= step)
    if kept == data:
        return
    if foreign := sum(row is None and line.endswith(b"\n") for line, row in rows):
        aside = run.path / DAMAGED
        write_whole(aside, data)
        say(f"warning: {foreign} lines of {run.metrics} are none of a run's and are left out; all are kept in {aside}")
    write_whole(run.metrics, kept)


def read_metrics(run: RunDir) -> list[dict]:
    """All whole rows of `metrics.jsonl`."""
    return [row for _, row in _rows(run.metrics.read_bytes()) if row is not None] if run.metrics.exists() else []


def _rows(data: bytes) -> Iterator[tuple[bytes, dict | None]]:
    """Lines and their rows; None for a foreign line and for one that a crash cut short."""
    for line in data.splitlines(keepends=True):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line.decode())
            if isinstance(found, dict) and type(found.get("step")) is int and line.endswith(b"\n"):
                row = found
        yield line, row


def headline(row: Mapping[str, float]) -> str:
    """The figures of a step that tell most.

    >>> headline({"loss/policy": 0.25, "loss/value": 1.0, "objective/scores": 1.5, "objective/kl": 0.02})
    'loss 0.2500  objective/scores 1.5  objective/kl 0.02'
    """
    loss = next((f"loss {v:.4f}" for k, v in row.items() if k.startswith("loss")), "nothing to learn from")
    more = [f"{k} {row[k]:.4g}" for k in ("objective/scores", "objective/kl") if k in row]
    return "  ".join([loss, *more])


class Progress:
    """A line that says how far the run is: step, loss, tokens per second, time left.

    On a terminal a bar that stays in place; elsewhere a plain line now and then.
    """

    _EVERY = 10.0  # seconds between plain lines

    def __init__(self, name: str, total: int, *, start: int, enabled: bool):
        self._name, self._total, self._bar, self._last = name, total, None, 0.0
        self._enabled = enabled and is_main()
        self._start = start
        self._from: tuple[int, float] | None = None  # the first step seen and when: compilation lies before it
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=start, figures="compiling")
            self._bar.start()

    def update(self, step: int, figures: str, tokens_per_second: float | None) -> None:
        """Shows a finished step."""
        if not self._enabled:
            return
        figures += f"  {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        first, begun = self._from = self._from or (step, now)
        if step in (self._start + 1, self._total) or now - self._last > self._EVERY:
            left = f"  {clock((now - begun) / (step - first) * (self._total - step))} left" if step > first else ""
            say(f"{self._name}  step {step}/{self._total}  {figures}{left}")
            self._last = now

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """
    >>> clock(3725), clock(65), clock(4)
    ('1h02m', '1m05s', '4s')
    """
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def count_tokens(rows: Any) -> int:
    """Tokens of a host batch that are not padding: those that see another token, or that another token sees.

    Args:
      rows: `types.Rows` of numpy arrays [B, T].

    >>> from jaxalign.types import Rows
    >>> count_tokens(Rows(np.zeros((1, 4)), None, np.array([[0, 0, 0, 3]]), np.array([[1, 2, 3, 4]])))
    3
    """
    start, end = np.asarray(rows.attend_start), np.asarray(rows.attend_end)
    batch, length = start.shape
    edges = np.zeros((batch, length + 1), np.int64)
    row = np.arange(batch)[:, None]
    np.add.at(edges, (row, start), 1)
    np.add.at(edges, (row, end), -1)
    seen_by = np.cumsum(edges, axis=1)[:, :length]
    return int(np.sum((end - start > 1) | (seen_by > 1)))
