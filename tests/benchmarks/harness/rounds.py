"""Runs a case: starts every contender once, lets them work in turns, one at a time, and keeps what each turn took."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import contenders, data, environments, machine
from harness.cases import Case

WORKERS = Path(__file__).resolve().parent.parent / "workers"
START_SECONDS, TURN_SECONDS = 900, 900  # limits: start-up to the first line, one turn


class Failed(Exception):
    """A worker that ended or hung where it should not; the message ends with its log."""


class Effort(NamedTuple):
    """How much is put into a measurement."""

    rounds: int  # that count; as many again are run to make up for disturbed ones
    threads: int  # of each
    patience: float  # seconds that a round waits, at most, for a machine that others leave alone
    omp_wait: str  # of torch's threads: default or passive
    hurry: bool  # start all at once; the figures of the start are then worth nothing


class Worker:
    """One contender's process."""

    def __init__(self, name: str, who: contenders.Contender, case: Case, directory: Path, effort: Effort):
        self.name = name
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=directory))
        self._log = scratch / "log.txt"
        spec = {
            "case": case.to_dict(),
            "options": who.options,
            "directory": str(directory),
            "scratch": str(scratch),
            "threads": effort.threads,
            "spawned": time.time(),
        }
        (scratch / "spec.json").write_text(json.dumps(spec))
        workers = Path(who.tree, "tests", "benchmarks", "workers") if who.tree else WORKERS
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [environments.python_of(who.environment), workers / f"{who.worker}.py", scratch / "spec.json"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(directory, effort) | ({"PYTHONPATH": who.tree} if who.tree else {}),
                cwd=scratch,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def read(self, limit: float) -> dict[str, Any]:
        """The worker's next message.

        Raises:
          Failed: it ended, or said nothing for `limit` seconds.
        """
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            line = None
        if not line:
            problem = f"said nothing for {limit:.0f} s" if line is None else f"ended with {self._process.wait()}"
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])
            raise Failed(f"{self.name} {problem}\n{tail}")
        return json.loads(line)

    def say(self, word: str) -> None:
        """Sends an order."""
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.read(5)
            raise

    def turn(self) -> dict[str, Any]:
        """One turn, and `others`: the cores that someone else had meanwhile, as a mean number."""
        busy = machine.busy_seconds()
        self.say("go")
        said = self.read(TURN_SECONDS)
        said.pop("event")
        others = None
        if busy is not None:
            others = max(0.0, machine.busy_seconds() - busy - said["cpu_seconds"]) / said["seconds"]
        said = {k: round(v, 5) if isinstance(v, float) else v for k, v in said.items()}
        return said | {"others": None if others is None else round(others, 3)}

    def stop(self) -> dict[str, Any]:
        """Ends the process; its last message."""
        self.say("stop")
        said = self.read(60)
        self._process.wait(60)
        return said

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _environment(directory: Path, effort: Effort) -> dict[str, str]:
    """A few threads each; nothing is fetched or shown.

    Torch's threads, left to their default, look for work for a few milliseconds before they sleep: none spins while its
    process waits for its turn, and it steps a sixth faster than with `passive` on a quiet machine. On a busy one they
    are in each other's way, and `passive` is kinder.
    """
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "OMP_", "GOMP_", "HF_", "PYTHONP"))
    }
    threads = str(effort.threads)
    kept |= {"OMP_WAIT_POLICY": "PASSIVE"} if effort.omp_wait == "passive" else {}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # every start is a first one
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }


def run(case: Case, names: list[str], effort: Effort) -> dict[str, Any]:
    """Measures a case.

    Args:
      case: what to do.
      names: of its contenders.
      effort: how often and how carefully.

    Returns:
      JSON values: the case, and for each contender and the ceiling what they said; see `table` for what they mean.
    """
    with tempfile.TemporaryDirectory(prefix="jaxalign-peers-") as folder:
        directory = Path(folder)
        data.write(case, directory)
        lengths = data.lengths_of(case) if case.ragged else []
        found: dict[str, Any] = {"case": case.to_dict(), "tokens_per_step": case.tokens(), "contenders": {}}
        for group in [[name] for name in names] if case.alone and not effort.hurry else [names]:
            figures = _measure(case, group, directory, effort)
            found.setdefault("ceiling", []).extend(turn["gflops"] for turn in figures.pop("ceiling")["rounds"])
            for name, entry in figures.items():
                entry["flops_per_token"] = round(case.flops(name, lengths), 1)
            found["contenders"] |= figures
        return found


def _measure(case: Case, names: list[str], directory: Path, effort: Effort) -> dict[str, dict[str, Any]]:
    """Rounds of some contenders and the ceiling; every round starts with another one."""
    entries: dict[str, dict[str, Any]] = {}
    workers: list[Worker] = []
    try:
        who = {name: contenders.contender(name, case.task) for name in names} | {"ceiling": contenders.CEILING}
        for name, contender in who.items():
            worker = Worker(name, contender, case, directory, effort)
            workers.append(worker)
            if not effort.hurry:
                entries[name] = worker.read(START_SECONDS)
        for worker in workers:
            if effort.hurry:
                entries[worker.name] = worker.read(START_SECONDS)
            entries[worker.name].pop("event")
            entries[worker.name]["rounds"] = []
        disturbances: list[float] = []
        # Alone, there is no other contender whose round would be repeated too.
        for number in range(effort.rounds * (1 if case.alone or effort.hurry else 2)):
            machine.wait_for_quiet(effort.patience)
            first = number % len(workers)
            turns = {worker.name: worker.turn() for worker in workers[first:] + workers[:first]}
            for name, turn in turns.items():
                entries[name]["rounds"].append(turn)
            disturbances.append(max(turn["others"] or 0.0 for turn in turns.values()))
            if sum(d < machine.DISTURBED for d in disturbances) == effort.rounds:
                break
        best = sorted(range(len(disturbances)), key=lambda i: disturbances[i])[: effort.rounds]
        for entry in entries.values():
            for number, turn in enumerate(entry["rounds"]):
                turn["counts"] = number in best  # chosen by what others did, whatever the turns took
        for worker in workers:
            entries[worker.name]["peak_gib"] = worker.stop()["peak_gib"]
    finally:
        for worker in workers:
            worker.kill()
    return entries
