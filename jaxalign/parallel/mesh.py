"""The device mesh: three named axes, `data`, `fsdp`, `tensor`, filled from the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxalign.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes that rows of a batch are split over


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as a mesh of axes `data`, `fsdp`, `tensor`.

    The axes are `AxisType.Auto` (`jax.make_mesh` makes Explicit ones): shardings are hints and pinned outputs,
    never part of an array's type.

    Args:
      sizes: devices along each axis; an axis that is absent has size 1 and one -1 takes what is left.
      devices: the devices to use; all of them by default.

    Returns:
      A mesh of all the devices.

    Raises:
      InputError: unknown axis, more than one -1, or a product that is not the number of devices.

    >>> dict(make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    from jax.experimental import mesh_utils

    if devices is None:
        devices = jax.devices()
    devices = list(devices)
    shape = mesh_shape(sizes, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:  # several TPU slices: the slow network between them carries the `data` axis alone
        if shape[0] % slices:
            raise InputError(
                f"mesh.data is {shape[0]} on {slices} TPU slices",
                "a `data` axis that the slices divide, so that only gradients cross between slices",
                f"--config.mesh.data={slices}",
            )
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
    """The sizes of the three axes, with -1 filled.

    Args:
      sizes: devices along each axis, as in `make_mesh`.
      num_devices: how many there are.

    >>> mesh_shape({"data": 2, "fsdp": -1, "tensor": 2}, 8)
    (2, 2, 2)
    """
    for axis, size in sizes.items():
        if axis not in AXES:
            raise InputError(f"mesh axis {axis!r}", f"one of {', '.join(AXES)}", "--config.mesh.fsdp=-1")
        if size != -1 and size < 1:
            raise InputError(
                f"mesh.{axis} is {size}", "a positive number, or -1 for the rest", f"--config.mesh.{axis}=1"
            )
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1:
        names = [a for a, s in zip(AXES, shape, strict=True) if s == -1]
        raise InputError(f"mesh.{' and mesh.'.join(names)} are -1", "at most one -1", f"--config.mesh.{names[0]}=1")
    known = math.prod(s for s in shape if s != -1)
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if math.prod(shape) != num_devices:
        text = " x ".join(f"{a}={s}" for a, s in zip(AXES, shape, strict=True))
        raise InputError(
            f"a mesh of {text} on {num_devices} device(s)",
            f"axis sizes whose product is {num_devices}",
            "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1",
        )
    return shape[0], shape[1], shape[2]


def batch_shards(mesh: Mesh) -> int:
    """How many shards the rows of a batch have."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)
