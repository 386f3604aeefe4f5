"""Starting JAX's own multi-controller runtime from what the cluster has already set."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from jaxalign.errors import InputError

_PORT = 8476


def initialize(timeout: int = 300) -> bool:
    """Joins this process to the others of the run; with one process, does nothing.

    What is looked for, in this order:
      1. `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: what a person or a launcher sets;
      2. Kubernetes JobSet or indexed Job: `JOB_COMPLETION_INDEX`, with `JAX_NUM_PROCESSES` and either
         `JAX_COORDINATOR_ADDRESS` or `JOBSET_NAME` and `REPLICATED_JOB_NAME`;
      3. Slurm (`srun`), Open MPI and PMI (MPICH, Intel MPI), where they started more than one task;
      4. a TPU slice of several hosts: `TPU_WORKER_HOSTNAMES`, or on any TPU VM what its metadata say.

    After it SIGTERM is swallowed by the runtime; the loop polls `reached_preemption_sync_point` instead.

    Args:
      timeout: seconds without a heartbeat after which a process counts as lost; the runtime, which then aborts the
        others without a message, waits a little longer than `watch.watched`.

    Returns:
      True where several processes were joined.

    Raises:
      InputError: half of the settings are there.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    env = os.environ
    if "xla_force_host_platform_device_count" in env.get("XLA_FLAGS", ""):
        # Virtual devices: XLA may start independent collectives in a different order on each device and blocks a
        # thread for each; with as few threads as cores the devices deadlock, until they are aborted.
        env.setdefault("NPROC", "64")
    found = settings(env)
    heartbeat: dict[str, Any] = {"heartbeat_timeout_seconds": int(timeout) + 30}
    if found is None:
        return on_tpu_vm(env) and _ask_tpu_metadata(heartbeat)
    if found.get("num_processes") == 1:
        return False
    # Where nothing is found, jax asks the cluster (Slurm, Open MPI, TPU metadata).
    jax.distributed.initialize(**found, **heartbeat)
    return jax.process_count() > 1


def settings(env: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with: None for one process, {} where jax finds out by itself.

    >>> settings({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 1}
    >>> settings({})
    >>> settings({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"})
    {}
    """
    address = env.get("JAX_COORDINATOR_ADDRESS")
    count = env.get("JAX_NUM_PROCESSES")
    index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX"))
    if not address and count and "JOBSET_NAME" in env and "REPLICATED_JOB_NAME" in env:
        name = env["JOBSET_NAME"]
        address = f"{name}-{env['REPLICATED_JOB_NAME']}-0-0.{name}:{_PORT}"
    if address and count and index is not None:
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:  # absent in sbatch's own shell
        gpus = int(env.get("SLURM_GPUS_ON_NODE", "0"))
        if gpus > 1 and env.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1":
            return {"local_device_ids": list(range(gpus))}  # jax would give a node's only task its first GPU alone
        return {}
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {}
    if int(env.get("PMI_SIZE", "1")) > 1:
        if not address:
            raise _half("PMI_SIZE (MPICH or Intel MPI) without JAX_COORDINATOR_ADDRESS")
        return {
            "coordinator_address": address,
            "num_processes": int(env["PMI_SIZE"]),
            "process_id": int(env["PMI_RANK"]),
        }
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    if address or count:
        raise _half(f"JAX_COORDINATOR_ADDRESS={address} JAX_NUM_PROCESSES={count} and process {index}")
    return None


def on_tpu_vm(env: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that jax is to use."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and find_spec("libtpu") is not None


def _ask_tpu_metadata(heartbeat: dict[str, Any]) -> bool:
    try:
        jax.distributed.initialize(**heartbeat)
    except ValueError:  # chips that no cluster owns: one process
        return False
    return jax.process_count() > 1


def _half(found: str) -> InputError:
    return InputError(
        found,
        "all three of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none",
        "export JAX_COORDINATOR_ADDRESS=HOST:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0",
    )


def is_main() -> bool:
    """Whether this is process 0, which prints and writes."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line above the progress line, on process 0 alone."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def first_problem(problem: str) -> str:
    """Agrees on a problem: every process gets its own, or that of the first process that has one; "" where none has.

    Every process calls it; what only one of them sees (a file, a model on its disk) stops all together.

    Args:
      problem: in words.
    """
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    room = np.zeros(1024, np.uint8)
    text = np.frombuffer(problem.encode()[: len(room)], np.uint8)
    room[: len(text)] = text
    found = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(room)]
    return next((f"process {i}: {text}" for i, text in enumerate(found) if text), "")


def on_main(call: Callable[[], Any]) -> Any:
    """Calls a function on process 0 and broadcasts its result, or its error, to all processes.

    Args:
      call: returns JSON values.

    Raises:
      InputError: what the function raised, on every process.
      RuntimeError: on the others, where it raised anything else on process 0.
    """
    if jax.process_count() == 1:
        return call()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    error: BaseException | None = None
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": call()}
        except InputError as found:
            error, outcome = found, {"input": found.args}
        except Exception as found:
            error, outcome = found, {"failed": f"{type(found).__name__}: {found}"}
    text = json.dumps(outcome).encode()
    size = int(broadcast_one_to_all(np.int32(-(-len(text) // 1024) * 1024)))  # few sizes: each is a program
    padded = np.frombuffer(text.ljust(size)[:size], np.uint8)
    outcome = json.loads(np.asarray(broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if error is not None:
        raise error
    if "input" in outcome:
        problem, expected, fix, places = outcome["input"]
        raise InputError(problem, expected, fix, tuple(places))
    if "failed" in outcome:
        raise RuntimeError(f"process 0: {outcome['failed']}")
    return outcome["value"]
