"""The machine as it is while something runs: who else uses its cores."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

QUIET = 0.1  # cores that others may have while the machine counts as quiet
DISTURBED = 0.2  # cores of others, on average over a turn, from which on it counts as disturbed


def use_cores(count: int) -> int:
    """Keeps this process and all it starts to `count` cores; returns how many there are to use."""
    if not hasattr(os, "sched_setaffinity"):
        return min(count, os.cpu_count() or 1)
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def busy_seconds() -> float | None:
    """CPU seconds that this machine has given since it started, to anyone, on the cores that are used here.

    Time that the hypervisor kept for others counts as given. None where the system does not say.
    """
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return None
    wanted = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    total = 0.0
    for line in stat.read_text().splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit: float) -> float:
    """Waits until others leave the cores alone, `limit` seconds at most; returns the seconds waited.

    To be called while nothing of our own runs.
    """
    start = time.monotonic()
    while busy_seconds() is not None and time.monotonic() - start < limit:
        busy, mark = busy_seconds(), time.monotonic()
        time.sleep(min(2.0, limit))
        if (busy_seconds() - busy) / (time.monotonic() - mark) < QUIET:
            break
    return time.monotonic() - start


def describe() -> dict[str, Any]:
    """What a result depends on: processor, cores, memory; no name of a host."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.exists():
        found = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    memory = None
    if meminfo.exists():
        memory = round(int(meminfo.read_text().split()[1]) / 2**20, 1)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory,
        "system": platform.system(),
        "python": platform.python_version(),
    }
