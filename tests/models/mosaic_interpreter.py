"""Runs Mosaic GPU kernels on a CPU: JAX's own interpreter, with the operands of products that it does not take.

The interpreter has the threads, barriers, copies and shared memory of a block; layouts and the room in registers it
does not see. Turned operands (which it has from jax 0.11 on) and those in registers are added here, products are late,
and a thread's program is compiled once, not once for each thread and block.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.core import UnswizzleRef, UntilingTransform
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform

_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # programs run a few times


def _product(**given: Any):
    """`accumulator += a @ b`, for any of the operands' forms."""
    memory = gpu_callbacks._get_shared_memory()
    thread = given.get("thread")
    if thread is None:  # before jax 0.11
        thread = memory.get_global_thread_id(int(given["device_id"]), int(given["thread_id"]))

    def place(name: str):
        key = gpu_callbacks.HostAllocationKey.from_array(given[f"{name}_allocation_key_as_array"])
        left_out = (TransposeTransform, UnswizzleRef, UntilingTransform)
        steps = jax.tree.map(int, tuple(t for t in given[f"{name}_transforms"] if not isinstance(t, left_out)))
        if hasattr(memory, "access"):
            return key, memory.access(key, steps)
        return key, gpu_callbacks.interpret_utils.to_range(steps)

    def read(name: str) -> np.ndarray:
        key = np.asarray(given[f"{name}_allocation_key_as_array"])
        if key.dtype.kind not in "iu":
            return key.astype(np.float32)  # no key: the operand itself, out of registers
        x = memory.get_buffer_content(*place(name), thread)[0].astype(np.float32)
        return x.T if any(isinstance(t, TransposeTransform) for t in given[f"{name}_transforms"]) else x

    time.sleep(0.003)  # late, as on the machine: whoever frees the operands too early has them overwritten
    memory.store_buffer_content(*place("acc"), read("acc") + read("a") @ read("b"), thread)
    return given["token"]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels that are traced inside are interpreted; memory holds no number before the kernel writes it."""
    programs: dict[int, Any] = {}
    lock = threading.Lock()

    def run(jaxpr, consts, *args) -> None:
        with lock:
            if id(jaxpr) not in programs:
                program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                programs[id(jaxpr)] = (program.lower(consts, *args).compile(_QUICK), jaxpr)
        programs[id(jaxpr)][0](consts, *args)

    before = gpu_callbacks.wgmma, thread_map._run_jaxpr
    gpu_callbacks.wgmma, thread_map._run_jaxpr = _product, run
    try:
        with params.force_gpu_interpret_mode(params.InterpretGPUParams()):
            yield
    finally:
        gpu_callbacks.wgmma, thread_map._run_jaxpr = before
        programs.clear()
