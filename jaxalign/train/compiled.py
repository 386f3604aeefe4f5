"""A jitted function compiled ahead of time, once for each shape of its arguments, with its memory account."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxalign.errors import InputError
from jaxalign.parallel.allocator import return_freed_memory
from jaxalign.parallel.compiler_options import compiler_options, without_unknown
from jaxalign.parallel.device_memory import device_limit, own_limit, repeated_bytes

# What to change, in the order of what saves most for least.
ADVICE = (
    "--config.grad_accum_steps=2 (or more: rows at a time), --config.model.remat=full, "
    "--config.data.max_length or --config.data.row_length smaller, --config.batch_size smaller, "
    "--config.mesh.fsdp=-1 with more devices, --config.optimizer.name=adafactor, "
    "--config.optimizer.state_dtype=bfloat16, --config.model.frozen_dtype=bfloat16, "
    "--config.adapter.rank=16 (LoRA: the model itself stays frozen; ten times the learning rate)"
)


class Compiled:
    """Calls `function` through executables made ahead of time, one for each set of argument shapes.

    An executable takes only arguments of the shardings that it was compiled for, so nothing is recompiled silently:
    not after the first step, after a restore, or in the last batch.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        *,
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
        tokens: Callable[..., int] | None = None,
    ):
        """
        Args:
          function: pure.
          name: how messages call it.
          donate: positions of the arguments whose memory the results take over.
          out_shardings: of all results; None leaves them to the compiler.
          tokens: of the arguments, the tokens for `compiler_options`.
        """
        self.name, self.num_compiles, self.compile_seconds, self.memory = name, 0, 0.0, {}
        function.__name__ = name.replace(" ", "_")  # what profiles show
        kwargs = {} if out_shardings is None else {"out_shardings": out_shardings}
        self._jitted = jax.jit(function, donate_argnums=donate, **kwargs)
        self._tokens = tokens or (lambda *args: 0)
        self._executables: dict[Any, Any] = {}

    def compile(self, *args: Any) -> Any:
        """The executable for arguments of these shapes (arrays or ShapeDtypeStructs)."""
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._executables:
            start = time.monotonic()
            with memory_errors(self.name):
                traced = self._jitted.trace(*args)
                repeated = repeated_bytes(_read(leaves, traced.jaxpr.jaxpr))
                executable = _compile(traced.lower(), self._tokens(*args), repeated)
            self.num_compiles += 1
            self.compile_seconds += time.monotonic() - start
            needed = memory_of(executable, repeated)
            refuse_what_cannot_fit(self.name, needed)
            if needed.get("total", 0) >= self.memory.get("total", 0):  # of several programs the largest
                self.memory = needed
            self._executables[key] = executable
            return_freed_memory()  # the compiler's memory would fragment that of the steps
        return self._executables[key]

    def __call__(self, *args: Any) -> Any:
        executable = self.compile(*args)
        with memory_errors(self.name, self.memory):
            return executable(*args)


def _read(leaves: list[Any], jaxpr: Any) -> list[Any]:
    """The arguments that a program reads; those of others are none of the executable's."""
    used = {id(v) for v in (*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars)}
    return [leaf for leaf, v in zip(leaves, jaxpr.invars, strict=True) if id(v) in used]


def _compile(lowered: Any, tokens: int, repeated: int) -> Any:
    executable = without_unknown(lambda: lowered.compile(compiler_options=compiler_options(update=True, tokens=tokens)))
    limit = device_limit()
    if limit and compiler_options() and memory_of(executable, repeated).get("total", 0) > limit:
        return lowered.compile()  # with less room in view the compiler may find a way
    return executable


def memory_of(executable: Any, repeated: int = 0) -> dict[str, int]:
    """Bytes that an executable needs on each device: `arguments`, `results`, `temporary`, and their `total`.

    Results that take over donated arguments are counted once.  Empty where the backend does not say.

    Args:
      executable: compiled.
      repeated: bytes of arguments that are given more than once, see `repeated_bytes`.
    """
    analysis = executable.memory_analysis()
    if analysis is None:
        return {}
    arguments, temporary = analysis.argument_size_in_bytes - repeated, analysis.temp_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "arguments": arguments,
        "results": results,
        "temporary": temporary,
        "total": arguments + results + temporary,
    }


def in_words(size: int) -> str:
    """A number of bytes for people.

    >>> in_words(3 * 2**30), in_words(5_300_000), in_words(800)
    ('3.00 GiB', '5.1 MiB', '0.0 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def peak_memory() -> int:
    """Peak bytes in use: on a device since the process began, on a CPU since `reset_peak_memory`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if stats.get("peak_bytes_in_use"):
        return int(stats["peak_bytes_in_use"])
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="utf-8") as file:
            found = [line for line in file if line.startswith("VmHWM")]
        if found:
            return int(found[0].split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Resets the process's peak, so that stages in one process are measured apart; Linux only."""
    return_freed_memory()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


def refuse_what_cannot_fit(name: str, memory: dict[str, int], limit: int | None = None) -> None:
    """Raises, before anything runs, where an executable needs more memory than a device has.

    Args:
      name: what is to run.
      memory: from `memory_of`.
      limit: bytes there; asked of the device by default.
    """
    limit = device_limit() if limit is None else limit
    if memory and limit and memory["total"] > limit:
        raise out_of_memory(name, memory, limit)


def out_of_memory(name: str, memory: dict[str, int], limit: int | None, detail: str = "") -> InputError:
    """The error for a program that does not fit: bytes needed, bytes there, what to change.

    >>> print(out_of_memory("train step", {"arguments": 2**30, "results": 0, "temporary": 2**31, "total": 3 * 2**30}, 2**31))
    found:    out of memory in the train step: it needs 3,221,225,472 bytes (3.00 GiB) on each device (arguments 1.00 GiB, results 0.00 GiB, temporary 2.00 GiB)
    expected: at most the 2,147,483,648 bytes (2.00 GiB) there
    fix:      --config.grad_accum_steps=2 (or more: rows at a time), --config.model.remat=full, --config.data.max_length or --config.data.row_length smaller, --config.batch_size smaller, --config.mesh.fsdp=-1 with more devices, --config.optimizer.name=adafactor, --config.optimizer.state_dtype=bfloat16, --config.model.frozen_dtype=bfloat16, --config.adapter.rank=16 (LoRA: the model itself stays frozen; ten times the learning rate)
    """  # noqa: E501  a doctest
    found = f"out of memory in the {name}"
    if memory:
        parts = ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in memory.items() if k != "total")
        found += f": it needs {memory['total']:,} bytes ({memory['total'] / 2**30:.2f} GiB) on each device ({parts})"
    if detail:
        found += f"; {detail}"
    there = f"the {limit:,} bytes ({limit / 2**30:.2f} GiB) there" if limit else "what the device has"
    return InputError(found, f"at most {there}", ADVICE)


class memory_errors:
    """`with memory_errors("train step"):` turns a runtime's out-of-memory error into one that says what to change."""

    def __init__(self, name: str, memory: dict[str, int] | None = None):
        self._name, self._memory = name, memory or {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        text = str(error)
        if isinstance(error, (RuntimeError, MemoryError)) and (
            isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
        ):
            raise out_of_memory(
                self._name, self._memory, own_limit(), (text.strip() or type(error).__name__).splitlines()[0][:300]
            ) from error
