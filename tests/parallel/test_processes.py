"""What a cluster sets, and what is made of it."""

import os

import jax
import pytest

from jaxalign.errors import InputError
from jaxalign.parallel import processes, startup
from jaxalign.parallel.processes import settings


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # sbatch's own shell, not under srun
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, {}),
        (
            {
                "SLURM_STEP_NODELIST": "a[1-2]",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_GPUS_ON_NODE": "4",
            },
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1", "JAX_COORDINATOR_ADDRESS": "h:1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            {"JOBSET_NAME": "j", "REPLICATED_JOB_NAME": "w", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            {"coordinator_address": "j-w-0-0.j:8476", "num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_settings(env, expected):
    assert settings(env) == expected


def test_one_process_does_nothing_and_several_join(monkeypatch):
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **settings: calls.append(settings))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    assert processes.initialize() is False and not calls
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    processes.initialize(60)
    found = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
    assert calls == [found | {"heartbeat_timeout_seconds": 90}]  # later than our own words


def test_a_tpu_vm_asks_its_metadata(monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    assert processes.on_tpu_vm({}) and processes.on_tpu_vm({"JAX_PLATFORMS": "tpu,cpu"})
    assert not processes.on_tpu_vm({"JAX_PLATFORMS": "cpu"})


def test_half_set_is_refused():
    with pytest.raises(InputError, match="JAX_PROCESS_ID"):
        settings({"JAX_COORDINATOR_ADDRESS": "h:1"})


def test_trap_virtual_devices_get_threads_and_no_stored_programs(monkeypatch):
    """Too few threads, or programs that XLA reads back, and collectives of several CPU devices wait for each other."""
    monkeypatch.delenv("NPROC")
    processes.initialize()
    assert os.environ["NPROC"] == "64"
    assert jax.device_count() == 8
    startup.use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
