"""A command in a process of its own, slow enough that a signal comes in the middle of it.

`python -m tests.fuzz.child SECONDS ARGUMENTS...` waits so long at every batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.case import Outcome

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """The process; what it prints is kept in a file."""

    def __init__(self, argv: list[str], *, here: Path, pace: float = 0.0, name: str = "child"):
        self.here, self.log, self.started = here, here.parent / f"{name}.log", time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", str(pace), *argv],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=open(self.log, "wb"),  # noqa: SIM115
            stderr=subprocess.STDOUT,
        )

    def until(self, step: int, file: Path, seconds: float = 90.0) -> bool:
        """Waits until so many steps are logged in the file; whether they were before the process ended."""
        return self.until_true(lambda: file.exists() and file.read_bytes().count(b'"step"') >= step, seconds)

    def until_true(self, test, seconds: float = 90.0) -> bool:
        """Waits until something is so; whether it was before the process ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if test():
                return True
            time.sleep(0.01)
        return test()

    def send(self, signal: int) -> None:
        """Sends a signal, where the process is still there."""
        if self.process.poll() is None:
            self.process.send_signal(signal)

    def end(self, seconds: float = 120.0) -> Outcome:
        """Waits for the end, and ends what does not."""
        ended = ""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            ended = "hang"
        text = self.log.read_text(errors="replace")
        return Outcome(self.process.returncode, text, time.monotonic() - self.started, ended)


def main() -> int:
    """Runs the command at its pace."""
    pace = float(sys.argv[1])
    if pace:
        from jaxalign.data.dataset import Dataset

        batch = Dataset.batch

        def slow(self, *args, **named):
            time.sleep(pace)
            return batch(self, *args, **named)

        Dataset.batch = slow
    from jaxalign.cli import main as command

    del sys.argv[1]
    return command()  # as a program: it ends at once when a Ctrl-C comes while it ends


if __name__ == "__main__":
    sys.exit(main())
