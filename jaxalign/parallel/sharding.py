"""Where arrays live on the mesh: one ordered table of (path, axes) for parameters, rows for batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.errors import InputError
from jaxalign.parallel.mesh import BATCH_AXES, batch_shards

# (regex of a path's end, axes of each dim): the first match wins, an unmatched path raises.  `fsdp` splits the
# embed dim D of every matrix, `tensor` the dim that heads or hidden units or the vocabulary run along.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"v_(row|col)/.*", PartitionSpec()),  # adafactor's factored moments: vectors, not worth splitting
    (r".*/ns_coeffs", PartitionSpec()),  # muon's three constants
    (r"embed/(embedding|positions)", PartitionSpec("tensor", "fsdp")),  # [V, D], [P, D]
    (r"(embed|lm_head)/token_rows", PartitionSpec(None, "fsdp")),  # [n, D]
    (r"attention/(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor", None)),  # [L, D, N|K, H]
    (r"attention/(query|key|value)/bias", PartitionSpec(None, "tensor", None)),  # [L, N|K, H]
    (r"attention/out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),  # [L, N, H, D]
    (r"mlp/(gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),  # [L, D, F]
    (r"mlp/(gate|up)/bias", PartitionSpec(None, "tensor")),  # [L, F]
    (r"mlp/down/kernel", PartitionSpec(None, "tensor", "fsdp")),  # [L, F, D]
    (r"(attention/out|mlp/down)/bias", PartitionSpec()),  # [L, D]
    # Quantised kernels: blocks lie along the embed dim D, which stays whole; `fsdp` splits the other dim too.
    (r"attention/(query|key|value)/kernel_(codes|scales)", PartitionSpec(None, None, "tensor", "fsdp")),
    (r"attention/out/kernel_(codes|scales)", PartitionSpec(None, "tensor", "fsdp", None)),
    (r"mlp/(gate|up)/kernel_(codes|scales)", PartitionSpec(None, None, ("tensor", "fsdp"))),
    (r"mlp/down/kernel_(codes|scales)", PartitionSpec(None, ("tensor", "fsdp"), None)),
    (r".*/kernel_ranges", PartitionSpec()),
    # Adapters: the dims of the kernels that they lie beside, and the rank, whole.
    (r"(attention/(query|key|value)|mlp/(gate|up))/lora_a", PartitionSpec(None, "fsdp", None)),  # [L, D, R]
    (r"attention/(query|key|value)/lora_b", PartitionSpec(None, None, "tensor", None)),  # [L, R, N|K, H]
    (r"attention/(query|key|value)/magnitude", PartitionSpec(None, "tensor", None)),  # [L, N|K, H]
    (r"attention/out/lora_a", PartitionSpec(None, "tensor", None, None)),  # [L, N, H, R]
    (r"mlp/(gate|up)/lora_b", PartitionSpec(None, None, "tensor")),  # [L, R, F]
    (r"mlp/(gate|up)/magnitude", PartitionSpec(None, "tensor")),  # [L, F]
    (r"mlp/down/lora_a", PartitionSpec(None, "tensor", None)),  # [L, F, R]
    (r"(attention/out|mlp/down)/lora_b", PartitionSpec(None, None, "fsdp")),  # [L, R, D]
    (r"(attention/out|mlp/down)/magnitude", PartitionSpec()),  # [L, D]
    (r"(\w*norm)/(scale|bias)", PartitionSpec()),  # [L, D] or [D]
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),  # [D, V]
    (r"score/kernel", PartitionSpec("fsdp", None)),  # [D, O]
    (r"score/bias", PartitionSpec()),  # [O]
)

# Logical dims of activations.
_LOGICAL: Mapping[str, tuple[str, ...]] = {"batch": BATCH_AXES, "fsdp": ("fsdp",), "tensor": ("tensor",)}


def path_name(path: tuple) -> str:
    """A tree path as words: `layers/attention/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter, or of one leaf of an optimizer's state that mirrors it.

    A dim that its axis does not divide stays whole: so key and value heads fewer than `tensor` are replicated.

    Args:
      path: names from the root joined by "/"; only its end is matched, so that `0/mu/embed/embedding` is too.
      shape: of the leaf.
      mesh: the mesh.

    Raises:
      KeyError: no rule matches; add one to `RULES`.
    """
    if math.prod(shape) <= 1:  # step counters, and adafactor's placeholders
        return PartitionSpec()
    spec = _rule(path)
    if spec is None:
        raise KeyError(f"no sharding rule matches {path} {shape}: add it to jaxalign.parallel.sharding.RULES")
    if not spec:
        return spec
    if len(spec) != len(shape):
        raise ValueError(f"{path} has shape {shape}; its rule {spec} is for {len(spec)} dims")
    return PartitionSpec(*(_fit(names, dim, mesh) for names, dim in zip(spec, shape, strict=True)))


def embed_dim(path: str) -> int:
    """Which dim of a kernel of a layer is the embed dim D: in each layer, 0 is the first.

    >>> embed_dim("layers/attention/query/kernel"), embed_dim("layers/mlp/down/kernel")
    (0, 1)
    """
    spec = _rule(path)
    assert spec is not None, path
    return spec.index("fsdp") - 1


def without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    """The same, whole where `fsdp` split it.

    >>> tuple(without_fsdp(PartitionSpec("fsdp", ("tensor", "fsdp"))))
    (None, 'tensor')
    """

    def one(axes):
        names = (axes,) if isinstance(axes, str) else axes or ()
        left = tuple(name for name in names if name != "fsdp")
        return left[0] if len(left) == 1 else left or None

    return PartitionSpec(*map(one, spec))


def _rule(path: str) -> PartitionSpec | None:
    return next((spec for pattern, spec in RULES if re.search(rf"(^|/){pattern}$", path)), None)


def _fit(names: Any, dim: int, mesh: Any) -> Any:
    """The longest leading part of the axes that divides the dim."""
    names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    while names and dim % math.prod(mesh.shape[a] for a in names):
        names = names[:-1]
    return None if not names else names[0] if len(names) == 1 else names


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of parameters or of optimizer state.

    Args:
      mesh: the mesh.
      tree: arrays or ShapeDtypeStructs.

    Returns:
      A tree of the same structure of NamedSharding.
    """

    def one(path, leaf):
        return NamedSharding(mesh, param_spec(path_name(path), tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def unsplit(mesh: Mesh, tree: Any) -> list[str]:
    """A sentence for each parameter dim that stays whole because its axis does not divide it."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        for axis, dim in zip(_rule(name) or (), leaf.shape, strict=False):
            if axis is not None and dim % mesh.shape[axis]:
                found.append(f"{name} keeps its dim of {dim} whole: {axis}={mesh.shape[axis]} does not divide it")
    return found


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows, the leading dim, split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """This process's share of each batch's rows: (part, number of parts).

    Processes that hold different shards of the same rows (a `tensor` axis over hosts) read the same part.
    """
    if jax.process_count() == 1:
        return 0, 1
    shards = batch_shards(mesh)
    rows: set[int] = set()
    device: Any
    for device, index in batch_sharding(mesh).devices_indices_map((shards,)).items():
        if device.process_index == jax.process_index():
            rows.update(range(*index[0].indices(shards)))
    first, count = min(rows), len(rows)
    if max(rows) - first + 1 != count or shards % count or first % count:
        raise InputError(
            f"process {jax.process_index()} holds the batch shards {sorted(rows)} of {shards}",
            "a neighbouring run of shards on every process",
            "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1",
        )
    return first // count, shards // count


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Places a process's own rows on its devices as parts of global arrays.

    Args:
      tree: numpy arrays whose leading dim is this process's rows (`batch_part` says which).
      mesh: the mesh.

    Returns:
      The tree with global jax arrays, rows over `data` and `fsdp`.
    """
    sharding, (_, parts) = batch_sharding(mesh), batch_part(mesh)

    def put(x):
        x = np.asarray(x)
        if x.shape[0] * parts % batch_shards(mesh):
            raise InputError(
                f"a batch of {x.shape[0] * parts} rows on a mesh that splits it {batch_shards(mesh)} ways",
                "a multiple of data x fsdp",
                f"--config.batch_size={-(-x.shape[0] * parts // batch_shards(mesh)) * batch_shards(mesh)}",
            )
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))

    return jax.tree.map(put, tree)


def ambient_shards() -> int:
    """How many shards the rows of a batch have under the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)  # type: ignore[arg-type]


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Hints how an activation is split, under the ambient mesh (`jax.set_mesh`); without one, nothing happens.

    Args:
      x: any array.
      dims: for each dim "batch" (over `data` and `fsdp`), "fsdp", "tensor", or None; an axis that does not divide
        its dim, or that a `shard_map` around has taken, is left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or not mesh.shape:
        return x
    if len(dims) != x.ndim:
        raise ValueError(f"{len(dims)} dims for an array of shape {x.shape}")
    auto = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}
    spec = []
    for dim, size in zip(dims, x.shape, strict=True):
        axes = tuple(a for a in (() if dim is None else _LOGICAL[dim]) if a in auto)
        spec.append(_fit(axes, size, mesh))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if auto else x
