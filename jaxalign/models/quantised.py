"""Models whose layers hold kernels in few bits: which parameters these are, how they are read, what they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding

from jaxalign.ops.quantised import PARTS, Quantised, dequantise, quantise
from jaxalign.parallel.sharding import embed_dim, param_spec, without_fsdp
from jaxalign.types import Params

LEAVES = ("kernel_codes", "kernel_scales", "kernel_ranges")


def parts_of(kernel: str, kind: str) -> list[str]:
    """The paths of what takes the place of a kernel.

    >>> parts_of("layers/mlp/up/kernel", "int8")
    ['layers/mlp/up/kernel_codes', 'layers/mlp/up/kernel_scales']
    """
    return [f"{kernel}_{part}" for part in PARTS[kind]]


def kernel_at(path: str) -> str | None:
    """The path of the kernel that the parameter at a path is part of; None where it is none in few bits.

    >>> kernel_at("layers/mlp/up/kernel_codes"), kernel_at("layers/mlp/up/bias")
    ('layers/mlp/up/kernel', None)
    """
    *before, name = path.split("/")
    return "/".join([*before, "kernel"]) if name in LEAVES else None


def quantised_parts(kernel: Any, path: str, kind: str) -> dict[str, Any]:
    """What takes the place of the kernel of one layer's linear at a path, "attention/query"."""
    parts = quantise(kernel, kind, embed_dim(f"layers/{path}/kernel"))
    return {f"kernel_{name}": part for name, part in parts.items()}


def quantised(own: Mapping[str, Any], path: str, length: int) -> Quantised:
    """The kernel of one layer's linear.

    Args:
      own: the linear's parameters.
      path: of the linear, "attention/query".
      length: of the embed dim, D.
    """
    kernel, mesh = f"layers/{path}/kernel", jax.sharding.get_abstract_mesh()
    parts = {name.removeprefix("kernel_"): own[name] for name in LEAVES if name in own}
    gathered = None
    if not mesh.empty:
        spec = param_spec(f"{kernel}_codes", (1, *parts["codes"].shape), mesh)  # type: ignore[arg-type]
        gathered = PartitionSpec(*without_fsdp(spec)[1:])
    return Quantised(parts, embed_dim(kernel), length, gathered)


def kernel_of(own: Mapping[str, Any], path: str, length: int, dtype: Any = jnp.float32) -> Any:
    """The same as an array; of a dtype where it was in few bits."""
    return own["kernel"] if "kernel" in own else dequantise(quantised(own, path, length), dtype)


def dequantised(layers: Params, length: int, dtype: Any, path: str = "") -> Params:
    """Stacked layers with whole kernels, made one after the other.

    Args:
      layers: [L, ...]; kernels that are not in few bits stay as they are.
      length: of the embed dim, D.
      dtype: of the kernels that were.
      path: in a layer, of a part of it.
    """
    parts = {name: x for name, x in layers.items() if kernel_at(name)}
    found = {}
    if parts:
        found["kernel"] = jax.lax.map(lambda own: kernel_of(own, path, length, dtype), parts)
    for name, own in layers.items():
        if isinstance(own, dict):
            found[name] = dequantised(own, length, dtype, f"{path}/{name}".lstrip("/"))
        elif not kernel_at(name):
            found[name] = own
    return found


def read_parts(
    read: Callable[[tuple[int, ...]], np.ndarray],
    kernel: str,
    kind: str,
    places: Mapping[str, tuple[jax.ShapeDtypeStruct, Sharding]],
    readers: int,
) -> dict[str, jax.Array]:
    """What takes the place of a kernel: each layer's is quantised whole, and devices take their parts of it.

    Args:
      read: one layer's kernel.
      kernel: its path.
      kind: "int8" or "nf4".
      places: shape, dtype and sharding of each part, by path.
      readers: layers at once.
    """
    linear = kernel.removeprefix("layers/").removesuffix("/kernel")
    here: dict[str, dict[tuple, np.ndarray]] = {}  # parts on this process's devices, by their bounds
    for path, (leaf, sharding) in places.items():
        bounds = {_bounds(at, leaf.shape) for at in sharding.addressable_devices_indices_map(leaf.shape).values()}
        here[path] = {own: np.empty([stop - start for start, stop in own], leaf.dtype) for own in bounds}

    def copy(layer: int) -> None:
        for name, part in quantised_parts(read((layer,)), linear, kind).items():
            for bounds, out in here[f"layers/{linear}/{name}"].items():
                out[layer - bounds[0][0]] = part[tuple(slice(*own) for own in bounds[1:])]

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(copy, range(next(iter(places.values()))[0].shape[0])))
    made = {}
    for path, (leaf, sharding) in places.items():
        part = functools.partial(lambda mine, shape, at: mine[_bounds(at, shape)], here[path], leaf.shape)
        made[path] = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))
    return made


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop in each dim."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
