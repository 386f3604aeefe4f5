"""AOT compilation of a configuration's train step for a target topology, to see that it compiles and fits.

XLA compiles for a described machine as well as for one that is there; no device is touched. The compilers come with
the extra `plan`. An answer takes the CPU seconds of one compilation and reads no weights, only `config.json`, the
tokenizer and the data.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

import jax

from jaxalign.errors import InputError

_GIB = 2**30

# Bytes of memory of one device, by the kind that XLA reports, as the makers publish it.
_MEMORY: dict[str, int] = {
    "TPU v5 lite": 16 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v6 lite": 32 * _GIB,
    "NVIDIA H100 80GB HBM3": 80 * _GIB,
    "NVIDIA H200": 141 * 10**9,
}

# What XLA wants to know of an NVIDIA GPU of the Hopper generation (GpuTargetConfigProto, text form).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""
_GPUS = {
    "h100": _HOPPER.format(bandwidth=3_350_000_000_000, memory=80 * _GIB, kind="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4_800_000_000_000, memory=141 * 10**9, kind="NVIDIA H200"),
}

_FORM = re.compile(r"(?P<platform>tpu|gpu):(?P<kind>[a-z0-9]+):(?P<shape>\d+(x\d+)*)(:(?P<slices>\d+))?")
_COLLECTIVE = re.compile(r"= .*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


class MachinePlan(NamedTuple):
    """What a train step needs of a machine."""

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    memory: dict[str, int]  # bytes on each device: arguments, results, temporary, total
    limit: int | None  # bytes a device has; None where this page does not know its kind
    collectives: dict[str, int]  # by name, as written in the program; those of a scanned layer count once
    compile_seconds: float

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None where the memory of the device is not known.

        >>> MachinePlan("", "", 1, {}, {"total": 2}, 1, {}, 0.0).fits
        False
        """
        return None if self.limit is None else self.memory["total"] <= self.limit

    def __str__(self) -> str:
        there = "unknown" if self.limit is None else f"{self.limit / _GIB:.1f} GiB"
        verdict = {True: "fits", False: "does not fit", None: "memory of the device not known"}[self.fits]
        parts = ", ".join(f"{k} {v / _GIB:.3f}" for k, v in self.memory.items())
        return (
            f"{self.topology}: {self.num_devices} x {self.device_kind}, mesh {self.mesh}: {verdict}\n"
            f"GiB on each device: {parts}; there: {there}\n"
            f"collectives: {self.collectives}; compiled in {self.compile_seconds:.0f} s"
        )


def parse_topology(topology: str) -> tuple[str, str, str, int]:
    """The parts of a machine's name: platform, kind, shape, number of slices.

    Args:
      topology: "tpu:KIND:SHAPE[:SLICES]", the shape in chips (`tpu:v5p:2x2x4`, `tpu:v5e:16x16`, `tpu:v6e:4x4:2`), or
        "gpu:KIND:SHAPE", the shape as slices x hosts x GPUs of a host (`gpu:h200:1x8x1`: eight hosts of one).

    Raises:
      InputError: another form.

    >>> parse_topology("tpu:v5p:2x2x4")
    ('tpu', 'v5p', '2x2x4', 1)
    """
    match = _FORM.fullmatch(topology)
    if match is None or (match["platform"] == "gpu" and (match["shape"].count("x") != 2 or match["slices"])):
        raise InputError(
            f"topology {topology!r}", "tpu:KIND:SHAPE[:SLICES] or gpu:KIND:AxBxC", "tpu:v5p:2x2x4, or gpu:h200:1x8x1"
        )
    if match["platform"] == "gpu" and match["kind"] not in _GPUS:
        raise InputError(f"GPU {match['kind']!r}", f"one of {', '.join(_GPUS)}", f"gpu:h200:{match['shape']}")
    return match["platform"], match["kind"], match["shape"], int(match["slices"] or 1)


def absent_devices(topology: str) -> list[Any]:
    """The devices of a described machine: a mesh can be made of them and programs compiled, nothing can be run.

    Args:
      topology: as `parse_topology` takes it.

    Raises:
      InputError: a name that cannot be read, or the platform's compiler is not installed.
    """
    from jax.experimental import topologies

    platform, kind, shape, slices = parse_topology(topology)
    try:
        if platform == "gpu":
            return topologies.get_topology_desc("", "cuda", target_config=_GPUS[kind], topology=shape).devices
        # libtpu would ask a metadata server which TPU this is.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        many = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **many).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"no machine {topology!r}: {str(error).splitlines()[0][:200]}",
            "a machine that the installed compilers know",
            'pip install -c launch/constraints.txt -e ".[plan]", or another shape',
        ) from error


def compile_for(topology: str, config: Any) -> MachinePlan:
    """Compiles the train step that `config` gives, for a machine that need not be there.

    Args:
      topology: such as "tpu:v5p:2x2x4" (16 chips) or "gpu:h200:1x8x1"; see `parse_topology`.
      config: one stage's configuration, made from `jaxalign.config.defaults`; its `mesh` lays out the devices.

    Returns:
      What the step needs.

    Raises:
      InputError: anything wrong in the configuration, or the step does not fit and the compiler says so.
    """
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings
    from jaxalign.train.checkpoints import abstract
    from jaxalign.train.compiled import memory_of, out_of_memory
    from jaxalign.train.dryrun import abstract_batch
    from jaxalign.train.models import fit_length
    from jaxalign.train.rundir import RunDir
    from jaxalign.train.stage import Stage

    config, _ = fit_length(config)
    devices = absent_devices(topology)
    kind = devices[0].device_kind
    mesh = make_mesh(config.mesh, devices)
    with tempfile.TemporaryDirectory() as scratch:
        # Built before the mesh is set: whatever is computed on the way must run on a device that is there.
        stage = Stage(config, mesh, RunDir(scratch))
        frozen = {name: role.abstract() for name, role in stage.program.frozen.items()}
        arguments = (stage.like, abstract(frozen, param_shardings(mesh, frozen)), abstract_batch(stage))
        start = time.monotonic()
        with jax.set_mesh(mesh):
            try:
                executable = stage.step.compile(*arguments)
            except jax.errors.JaxRuntimeError as error:
                if "memory" not in str(error).lower():
                    raise
                raise out_of_memory(f"train step on {topology}", {}, _MEMORY.get(kind), str(error)[:300]) from error
        seconds = time.monotonic() - start
    return MachinePlan(
        topology,
        kind,
        len(devices),
        dict(mesh.shape),
        memory_of(executable),
        _MEMORY.get(kind),
        dict(Counter(_COLLECTIVE.findall(executable.as_text()))),
        seconds,
    )
