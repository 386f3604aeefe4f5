"""Process start-up, before the first array: distributed runtime, allocator, persistent compilation cache."""

from __future__ import annotations

import hashlib
import os
import platform

import jax

from jaxalign.parallel.allocator import keep_freed_memory
from jaxalign.parallel.processes import initialize


def start(timeout: int = 300) -> None:
    """Joins this process to the others of its run and makes the settings that hold for all that it computes.

    Every command that computes calls it first; another call changes nothing.

    Args:
      timeout: see `processes.initialize`.

    Raises:
      InputError: half of the settings that join processes are there.
    """
    initialize(timeout)
    keep_freed_memory()
    use_compilation_cache()


def use_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in `JAX_COMPILATION_CACHE_DIR` or `~/.cache/jaxalign/xla`.

    CPU executables depend on the CPU's instruction set, so each kind of CPU has its own folder. With several CPU
    devices the cache is off unless its folder is set: a cached executable may start its collectives in a different
    order on each device, and hang (jax 0.10.2: always with a mesh of three axes).
    """
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    kind = jax.default_backend()
    if kind == "cpu" and jax.device_count() > 1:
        return
    if kind == "cpu":
        flags = platform.machine() + platform.processor()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                flags += next((line for line in file if line.startswith(("flags", "Features"))), "")
        kind += f"-{hashlib.blake2b(flags.encode(), digest_size=6).hexdigest()}"
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/jaxalign/xla/{kind}"))
