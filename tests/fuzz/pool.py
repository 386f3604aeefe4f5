"""Worker processes for many cases: one that hangs or dies is ended and replaced, and the case is told of it."""

from __future__ import annotations

import functools
import json
import os
import queue
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz.case import Case, Outcome

ROOT = Path(__file__).resolve().parents[2]
START = 600.0  # seconds until a worker is ready, its world built
# Programs that are compiled once for all campaigns.
COMPILED = Path(tempfile.gettempdir()) / f"jaxalign-tests-{os.getuid()}" / "xla-fuzz"


class Worker:
    """A process that runs cases, and is started again after one that it did not survive."""

    def __init__(self, directory: Path, seed: int):
        self.directory, self.seed = directory, seed
        self.process: subprocess.Popen | None = None

    def run(self, case: Case) -> Outcome:
        """A case's outcome."""
        if self.process is None:
            self._start()
        started = time.monotonic()
        self.process.stdin.write(f"{case.title}\n".encode())
        self.process.stdin.flush()
        answer = self._answer(case.limit)
        if answer is not None and answer.startswith("{"):
            return Outcome(**json.loads(answer))
        ended = "hang" if answer is None else "died"
        status = self.stop()
        return Outcome(None, f"{self._log()}\nprocess status {status}", time.monotonic() - started, ended)

    def stop(self) -> int | None:
        """Ends the process; gives its status."""
        if self.process is None:
            return None
        self.process.kill()
        status, self.process = self.process.wait(), None
        return status

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [
            *(["unshare", "--mount"] if own_mounts() else []),
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            str(self.directory),
            str(self.seed),
        ]
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": " ".join(flags),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.directory / "worker.log", "wb"),  # noqa: SIM115
            env=environment,
            cwd=ROOT,
        )
        if self._answer(START) != "ready":
            log = self._log()
            self.stop()
            raise RuntimeError(f"a worker did not start:\n{log}")

    def _answer(self, limit: float) -> str | None:
        """A line of the process: None where none came in time, "" where it has ended.

        Past the limit a process hangs where it does nothing, or has worked for as long; on a machine that is busy
        with other things it is given more time.
        """
        started, before, seen = time.monotonic(), self._worked(), [self._worked()] * 10
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not selector.select(2.0):
                waited, worked = time.monotonic() - started, self._worked()
                seen = [*seen[1:], worked]
                idle = worked - seen[0] < 0.1
                if waited > limit and (idle or worked - before > limit or waited > 8 * limit):
                    return None
        return self.process.stdout.readline().decode().strip()

    def _worked(self) -> float:
        """Seconds of processor time that the process has had."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _log(self) -> str:
        texts = [self.directory / name for name in ("worker.log", "printed.txt", "crash.txt")]
        return "\n".join(t.read_text(errors="replace")[-2000:] for t in texts if t.exists())


@functools.cache
def own_mounts() -> bool:
    """Whether a process can have mounts of its own, for disks that are full."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(tried, capture_output=True).returncode == 0


def run_all(cases: Iterable[Case], *, seed: int, workers: int = 2, told: Callable[[Case, Outcome], None]) -> None:
    """Runs cases on so many processes.

    Args:
      cases: each is run once.
      seed: that the cases were made from.
      workers: processes.
      told: called with each outcome, from one thread at a time.
    """
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    lock, errors = threading.Lock(), []
    with tempfile.TemporaryDirectory(prefix="jaxalign-fuzz-") as folder:

        def work(number: int) -> None:
            worker = Worker(Path(folder) / f"worker-{number}", seed)
            try:
                while not errors:
                    case = waiting.get_nowait()
                    outcome = worker.run(case)
                    with lock:
                        told(case, outcome)
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                worker.stop()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
