"""Machines that need not be there: their names, their memory, and devices to compile for."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.parallel.hardware import Hardware, find_machine, read_machines

# What XLA wants to know of an NVIDIA GPU (GpuTargetConfigProto, text form).
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_block} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""

_FORM = re.compile(
    r"(?P<platform>tpu|gpu):(?P<kind>[a-z0-9]+(-[a-z0-9]+)*):(?P<shape>\d+(x\d+)*)(:(?P<slices>\d+))?", re.ASCII
)
_MOST = 1 << 16  # devices


def parse_topology(topology: str, machines: Mapping[str, Hardware] | None = None) -> tuple[str, str, str, int]:
    """The parts of a machine's name: platform, kind, shape, number of slices.

    Args:
      topology: "tpu:KIND:SHAPE[:SLICES]", the shape in chips (`tpu:v5p:2x2x4`, `tpu:v5e:16x16`, `tpu:v6e:4x4:2`), or
        "gpu:KIND:SHAPE", the shape as slices x hosts x GPUs of a host, where the GPUs of a slice reach each other by
        NVLink (`gpu:h200:1x8x1`: one slice of eight GPUs, a process for each).
      machines: kinds that are known; None: those of `machines.toml`.

    Raises:
      InputError: another form, or a machine that is not known.

    >>> parse_topology("tpu:v5p:2x2x4")
    ('tpu', 'v5p', '2x2x4', 1)
    """
    match = _FORM.fullmatch(topology)
    if match is None or (match["platform"] == "gpu" and (match["shape"].count("x") != 2 or match["slices"])):
        raise InputError(
            f"machine {topology[:60]!r}",
            "gpu:KIND:SLICESxHOSTSxGPUS (GPUs of a slice are joined), or tpu:KIND:SHAPE[:SLICES], the shape in chips",
            f"--on={nearest_name(topology, machines)}",
        )
    try:
        find_machine(match["kind"], match["platform"], machines)
    except InputError as error:
        near, same = error.fix.rsplit(":", 1)[0], error.fix.startswith(f"--on={match['platform']}")
        fix = f"{near}:{match['shape']}" if same else error.fix
        raise InputError(error.found, error.expected, fix) from None
    digits = [*match["shape"].split("x"), match["slices"] or "1"]
    if any(len(n) > 6 for n in digits) or math.prod(map(int, digits)) > _MOST:
        raise InputError(
            f"machine {topology[:60]!r}: that many devices",
            f"at most {_MOST:,}",
            f"--on={match['platform']}:{match['kind']}:{'1x8x1' if match['platform'] == 'gpu' else '2x2'}",
        )
    sizes = [int(n) for n in digits]
    if not all(sizes):
        raise InputError(
            f"machine {topology!r} has no devices",
            "sizes of 1 and more",
            f"--on={re.sub(r'(?<=[:x])0+(?=[:x]|$)', '1', topology)}",
        )
    return match["platform"], match["kind"], match["shape"], sizes[-1]


def nearest_name(topology: str, machines: Mapping[str, Hardware] | None = None) -> str:
    """A machine's name in its right form, of the kind and as many devices as another form of it says; else eight.

    >>> nearest_name("h100"), nearest_name("gpu:h100:16"), nearest_name("8xa100"), nearest_name("gpu:h300:4")
    ('gpu:h100:1x8x1', 'gpu:h100:2x1x8', 'gpu:a100-80:1x8x1', 'gpu:h200:1x4x1')
    >>> nearest_name("v5p-8"), nearest_name("v5litepod-16"), nearest_name("tpu:v5p:2x2")
    ('tpu:v5p:2x2x1', 'tpu:v5e:4x4', 'tpu:v5p:2x2x1')
    """
    known = {name: m for name, m in (read_machines() if machines is None else machines).items() if m.platform}
    text = re.sub(r"(?<=\d)x(?=[a-z])", " ", topology.lower().replace("v5litepod", "v5e"))
    words = [w for w in re.findall(r"[a-z][a-z\d]*", text) if w not in ("gpu", "tpu", "x")] or [""]
    named = [name for name in known if name in text]
    word = max(named, key=len) if named else words[0]
    starts = [name for name in known if word and name.startswith(word)]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    kind = word if named else (starts or near or ["h200"])[-1]
    before, _, behind = text.partition(word) if word else (text, "", "")
    numbers = [n for n in map(int, re.findall("[0-9]{1,4}", behind or before)[:4]) if n]
    count = min(math.prod(numbers), 4096) if numbers else 8
    machine = known[kind]
    if machine.platform == "tpu":
        if machine.axes == 3 and re.fullmatch(r"-\d+", behind):
            count = max(count // 2, 1)  # `v5p-8` counts cores, two of a chip
        return f"tpu:{kind}:{_even(count, machine.axes)}"
    host = max(machine.domain, 8)
    several = count > host and count % host == 0
    return f"gpu:{kind}:{count // host}x1x{host}" if several else f"gpu:{kind}:1x{min(count, host)}x1"


def _even(count: int, axes: int) -> str:
    """Sides of a shape of so many chips, or fewer: powers of two, as even as can be.

    >>> _even(4, 3), _even(8, 3), _even(16, 3), _even(8, 2), _even(20, 2)
    ('2x2x1', '2x2x2', '2x2x4', '2x4', '4x4')
    """
    sides = [1] * axes
    for _ in range(min(count, 256 if axes == 2 else 4096).bit_length() - 1):
        sides[sides.index(min(sides))] *= 2
    return "x".join(map(str, sides if 1 in sides and axes == 3 else sorted(sides)))


def joined(machine: Hardware, topology: str) -> Hardware:
    """The machine, its `domain` that of a shape: a slice of GPUs in parts that are alike, none above `domain`.

    >>> from jaxalign.parallel.hardware import read_machines
    >>> [joined(read_machines()["h100"], f"gpu:h100:{shape}").domain for shape in ("2x1x4", "2x2x4", "1x2x8")]
    [4, 8, 8]
    """
    platform, _, shape = topology.split(":")[:3]
    if platform != "gpu":
        return machine
    _, hosts, gpus = map(int, shape.split("x"))
    alike = (n for n in range(1, min(hosts * gpus, machine.domain) + 1) if hosts * gpus % n == 0)
    return machine._replace(domain=max(alike))


def absent_devices(topology: str, machines: Mapping[str, Hardware] | None = None) -> list[Any]:
    """The devices of a described machine: a mesh can be made of them and programs compiled, nothing can be run.

    Args:
      topology: as `parse_topology` takes it.
      machines: kinds that are known; None: those of `machines.toml`.

    Raises:
      InputError: a name that cannot be read, a shape that does not exist, or the platform's compiler is not installed.
    """
    platform, kind, shape, slices = parse_topology(topology, machines)
    _require_compiler(platform)
    from jax.experimental import topologies

    machine = find_machine(kind, platform, machines)
    if machine.axes and len(shape.split("x")) != machine.axes:  # the compiler would take it for another shape
        raise InputError(
            f"no machine {topology!r}",
            f"a shape of {machine.axes} sides, which are what a slice of {kind} has",
            f"--on={platform}:{kind}:{nearest_shape(kind, shape, machine.axes)}",
        )
    try:
        if platform == "gpu":
            target = _target(machine)
            return topologies.get_topology_desc("", "cuda", target_config=target, topology=shape).devices
        # libtpu would ask a metadata server which TPU this is.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        many = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **many).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        near = nearest_shape(kind, shape, machine.axes)
        raise InputError(
            f"no machine {topology!r}: {str(error).splitlines()[0][:200]}",
            "a shape that the installed compilers know",
            f"--on={platform}:{kind}:{near}"
            if near
            else 'another shape, or pip install -c launch/constraints.txt "jaxalign[plan]"',
        ) from error


def nearest_shape(kind: str, shape: str, axes: int) -> str | None:
    """The nearest shape of a TPU slice that is made: sides that are powers of two, as many as the torus has.

    >>> nearest_shape("v5e", "3x4", 2), nearest_shape("v5p", "2x4", 3), nearest_shape("h100", "1x8x1", 0)
    ('2x4', '2x2x2', None)
    """
    if not axes:
        return None
    sides = [int(side) for side in shape.split("x")]
    sides = sorted(1 << (max(side, 2).bit_length() - 1) for side in sides)
    total = 1
    for side in sides:
        total *= side
    if len(sides) != axes:  # as many chips in a shape of so many sides, as even as can be
        sides = [1] * axes
        while total > 1:
            sides[sides.index(min(sides))] *= 2
            total //= 2
        sides.sort()
    most = 16 if axes == 2 else 32
    return "x".join(str(min(side, most)) for side in sides)


def _require_compiler(platform: str) -> None:
    """Says which extra brings the compiler of a platform, where it is missing."""
    if platform == "tpu":
        there = importlib.util.find_spec("libtpu") is not None
    else:
        there = any(_has(f"jax_plugins.xla_cuda{version}") for version in (13, 12))
    if not there:
        raise InputError(
            f"no compiler for a {platform.upper()} is installed",
            "the extra plan of jaxalign (compilers alone: no device is needed)",
            'pip install -c launch/constraints.txt -e ".[plan]"',
        )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def _target(machine: Hardware) -> str:
    t = dict(machine.target or {})
    major, _, minor = str(t["capability"]).partition(".")
    capability = f"major: {major} minor: {minor or 0}"
    if int(major) >= 9:
        capability += " feature_extension: ACCELERATED_FEATURES"
    numbers = {k: v for k, v in t.items() if k != "capability"}
    bandwidth, memory = int(machine.bandwidth), int(machine.memory)
    return _TARGET.format(**numbers, capability=capability, bandwidth=bandwidth, memory=memory, kind=machine.kinds[0])
