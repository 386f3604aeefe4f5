"""Calls of one process that take turns: seconds on the clock and of the cores, and ratios turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Taken(NamedTuple):
    """What one call took."""

    wall: float  # seconds
    cpu: float  # seconds of cores, of this process alone: what others do on the machine hardly counts


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, *, warm: int = 1) -> dict[str, list[Taken]]:
    """Calls each once a round, in one order and then in the other.

    Args:
      calls: by name; each waits for its own results.
      rounds: that count.
      warm: rounds before them.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in calls}
    for turn in range(warm + rounds):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if turn >= warm:
                taken[name].append(Taken(time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def median(taken: Sequence[Taken]) -> Taken:
    """Of each clock by itself."""
    return Taken(*(statistics.median(each) for each in zip(*taken, strict=True)))


def against(taken: Sequence[Taken], base: Sequence[Taken]) -> str:
    """How many times as long as another, by the clock (least to greatest of the rounds) and by CPU time."""
    wall, cpu = ([a[i] / b[i] for a, b in zip(taken, base, strict=True)] for i in (0, 1))
    return f"{statistics.median(wall):.2f}x ({min(wall):.2f} to {max(wall):.2f}), CPU {statistics.median(cpu):.2f}x"
