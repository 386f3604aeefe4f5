"""glibc malloc settings that keep a CPU step's temporary memory for the next step.

XLA takes a step's temporary arrays as one piece of memory and gives it back after the step. The GNU C library fetches
each piece beyond 32 MiB from the kernel and returns it at once, so that every step pays for clearing all its pages:
an eighth of the step of a small model.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # <malloc.h>
_SETTINGS = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES")  # of a person who has chosen an allocator or how it works


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process for the next step, on a CPU.

    To be called before JAX's first array: XLA must compute in the thread that calls it, since memory of other threads
    cannot be kept in pieces so large. Data are made ready in threads all the same.

    Without effect on accelerators; nothing is done for several virtual devices, without the GNU C library, or where the
    environment says how memory is allocated.

    Returns:
      Whether memory is kept.
    """
    glibc = _glibc()
    if glibc is None or _virtual_devices() or any(name.startswith(_SETTINGS) for name in os.environ):
        return False
    # The CPU's client reads it when it is made, which the next line does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return False
    return bool(glibc.mallopt(_MMAP_MAX, 0)) and bool(glibc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Returns unused memory to the kernel, so that a later peak does not include it."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _virtual_devices() -> bool:
    """Whether the CPU is several virtual devices; these would wait for each other in one thread."""
    flags = os.environ.get("XLA_FLAGS", "")
    return "xla_force_host_platform_device_count" in flags or getattr(jax.config, "jax_num_cpu_devices", 1) > 1


def _glibc() -> Any | None:
    """The C library of this process, where it is GNU's."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
