"""Machines that need not be there: their names, their memory, and devices to compile for."""

from __future__ import annotations

import os
import re
from typing import Any

from jaxalign.errors import InputError

_GIB = 2**30

# Bytes of memory of one device, by the kind that XLA reports, as the makers publish it.
MEMORY: dict[str, int] = {
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
