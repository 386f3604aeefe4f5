"""Where decoding runs: the training mesh's devices as a mesh of its own, and the parameters laid out there.

    decoding = decoding_mesh(mesh, tensor)              # some of `fsdp`'s devices split each layer instead
    with jax.set_mesh(decoding):
        laid = lay_out(model, seen_on(params, decoding), mesh)

Training splits rows and weights over `fsdp`, and gathers the weights of a layer for many tokens at once.  A step of
decoding reads all weights for a few tokens: they lie whole on each device, or, where `tensor` is more than 1, split
over so many neighbours, which decode the same rows together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.errors import InputError
from jaxalign.models import stacks
from jaxalign.models.adapter import is_adapter
from jaxalign.models.cache import slot_counts
from jaxalign.models.quantised import kernel_at
from jaxalign.models.schedule import cache_arrays
from jaxalign.models.transformer import Model
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.device_memory import device_bytes, device_limit
from jaxalign.parallel.mesh import batch_shards
from jaxalign.parallel.sharding import param_spec, path_name, without_fsdp
from jaxalign.rollout.driver import on_mesh, whole_shards
from jaxalign.rollout.slots import Prefilled, by_slots, prefill
from jaxalign.types import Array, Params, Rows

_SPARE = 0.92  # share of a device's memory that is counted on: the rest is for fragments and small arrays


class Place(NamedTuple):
    """A mesh of training, and one of the same devices that decodes."""

    mesh: Mesh | None  # None: one device
    decoding: Mesh | None

    @property
    def tensor(self) -> int:
        """Devices that split each layer in decoding."""
        return 1 if self.decoding is None else self.decoding.shape["tensor"]

    def slots(self, num_slots: int) -> int:
        """The least number of slots, at least so many, that the devices divide."""
        return num_slots if self.decoding is None else whole_shards(num_slots, self.decoding)

    def there(self, tree: Any) -> Any:
        """Arrays of the training mesh as `seen_on` the other."""
        return tree if self.decoding is self.mesh or self.decoding is None else seen_on(tree, self.decoding)

    def lay_out(self, model: Model, params: Params) -> Params:
        """The parameters as decoding reads them."""
        with on_mesh(self.decoding):
            return lay_out(model, self.there(params), self.mesh)

    def read(self, model: Model, params: Params, rows: Rows) -> Prefilled:
        """Reads prompts as training does: a layer's weights are gathered once for all of them; then moves the cache."""
        with on_mesh(self.mesh):
            prefilled = jax.block_until_ready(prefill(model, params, rows))
        if self.decoding is self.mesh:
            return prefilled
        with on_mesh(self.decoding):
            return jax.block_until_ready(by_slots(self.there(prefilled)))


def place_of(
    model: Model, params: Params, mesh: Mesh | None, tensor: int | None, held: int | None, *, slots: int, columns: int
) -> Place:
    """Where a rollout runs.

    Args:
      model: the policy.
      params: its parameters.
      mesh: of training; None: one device.
      tensor: devices that split each layer; None: see `split_of`, which takes the others.
      held: None: the parameters' bytes.
      slots: completions at a time.
      columns: of the cache.
    """
    if mesh is None:
        return Place(None, None)
    if tensor is None:
        held, limit = device_bytes(params) if held is None else held, device_limit(mesh)
        tensor = split_of(model, mesh, slots=slots, columns=columns, held=held, limit=limit).tensor
    return Place(mesh, decoding_mesh(mesh, tensor))


def decoding_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order, of which `tensor` neighbours split each layer.

    Args:
      mesh: of training.
      tensor: devices; its own `tensor` axis gives the mesh itself.

    Raises:
      InputError: `fsdp` is not divided by so many, or training splits layers otherwise.

    >>> from jaxalign.parallel.mesh import make_mesh
    >>> dict(decoding_mesh(make_mesh({"fsdp": -1}, jax.devices()[:1]), 1).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    data, fsdp, own = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    if tensor == own:
        return mesh
    if own > 1 or fsdp % tensor:
        raise InputError(
            f"rollout.tensor is {tensor} on a mesh of fsdp={fsdp} and tensor={own}",
            "what mesh.tensor is" if own > 1 else f"a divisor of fsdp={fsdp}: its devices are who split the layers",
            f"--config.rollout.tensor={own if own > 1 else math.gcd(fsdp, tensor)}",
        )
    return Mesh(mesh.devices.reshape(data, fsdp // tensor, tensor), mesh.axis_names, axis_types=mesh.axis_types)


def seen_on(tree: Any, mesh: Mesh) -> Any:
    """The same arrays with shardings of a decoding mesh; nothing is copied or moved.

    Args:
      tree: arrays or ShapeDtypeStructs, split over the training mesh; others stay as they are.
      mesh: from `decoding_mesh`: what was split over `fsdp` is split over its `fsdp` and `tensor`.
    """

    def one(x):
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh == mesh:
            return x
        there = NamedSharding(mesh, _finer(sharding.spec), memory_kind=sharding.memory_kind)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
        return jax.make_array_from_single_device_arrays(x.shape, there, [s.data for s in x.addressable_shards])

    return jax.tree.map(one, tree)


def _finer(spec: PartitionSpec) -> PartitionSpec:
    """What `fsdp` split is split over `fsdp` and `tensor`; training's own `tensor` has one device."""

    def one(axes):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        finer = {"data": ("data",), "fsdp": ("fsdp", "tensor"), "tensor": ()}
        return tuple(n for name in names for n in finer[name]) or None

    return PartitionSpec(*map(one, spec))


class Split(NamedTuple):
    """How the weights lie while completions are sampled."""

    tensor: int  # devices that split each layer
    why: str
    needed: dict[str, int]  # bytes of decoding on each device: "weights", "cache", "temporary"

    @property
    def words(self) -> str:
        return "whole on each device" if self.tensor == 1 else f"each layer split over {self.tensor} devices"


def split_of(
    model: Model,
    mesh: Mesh,
    asked: int | None = None,
    *,
    slots: int,
    columns: int,
    held: int,
    limit: int | None,
) -> Split:
    """How many devices split each layer in decoding: the fewest with which everything fits, a power of two.

    Where nothing fits it is what needs least.  A function of shapes, so that all processes and a resumed run agree.

    Args:
      model: the policy.
      mesh: of training; its own `tensor` axis, where it has one, stays.
      asked: so many; None: as above.
      slots: completions at a time.
      columns: of the cache, at its widest.
      held: bytes on each device beside what decoding needs.
      limit: bytes there; None: not known, everything fits.
    """
    own, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    given = asked or (own if own > 1 or limit is None else None)
    sizes = [1 << n for n in range(fsdp.bit_length()) if fsdp % (1 << n) == 0] if given is None else [given]
    needed = {n: _needed(model, decoding_mesh(mesh, n), slots, columns) for n in sizes}
    total = {n: held + sum(needed[n].values()) for n in sizes}
    fits = [n for n in sizes if limit is None or total[n] <= _SPARE * limit]
    tensor = fits[0] if fits else min(sizes, key=total.__getitem__)
    why = "as rollout.tensor says" if asked else "as in training" if own > 1 else "the least split that fits"
    if limit is None and not asked:
        why = "as in training: how much memory there is is not known"
    elif not fits:
        why += ", which does not fit" if given else ": none does, this one needs least"
    return Split(tensor, why, needed[tensor])


def _needed(model: Model, mesh: Mesh, slots: int, columns: int) -> dict[str, int]:
    """Bytes of decoding on each device: parameters, the cache beside prompts that have been read, and temporaries."""
    c, tensor = model.config, mesh.shape["tensor"]
    item = jnp.dtype(c.dtype).itemsize
    # A layer's kernels are made whole for each token where they are quantised, else once.
    held = model.plain() if c.quantised is None else model
    weights = 0
    for path, x in jax.tree_util.tree_flatten_with_path(held.abstract())[0]:
        name = path_name(path)
        of_number = item if kernel_at(name) is None else x.dtype.itemsize
        split = any("tensor" in (axes or ()) for axes in param_spec(name, x.shape, mesh))
        weights += of_number * math.prod(x.shape) // (tensor if split else 1)
    rows, arrays = -(-slots // batch_shards(mesh)), cache_arrays(c.num_layers)
    heads = c.num_kv_heads // tensor if c.num_kv_heads % tensor == 0 else c.num_kv_heads
    of_column = 2 * item * rows * heads * c.head_dim  # keys and values, of a layer
    cache = of_column * sum(slot_counts(c.windows, columns, arrays)) * c.num_layers // arrays
    prompts = of_column * c.num_layers * columns  # that have been read: of all columns, windows or not
    reading = -(-rows // tensor) * columns * _of_a_token(model)
    embedding = c.vocab_size * c.embed_dim * item // tensor
    sampling = 3 * 4 * rows * c.vocab_size // tensor
    return {"weights": weights, "cache": cache + prompts, "temporary": max(reading, embedding, sampling)}


def fewest_parts(model: Model, mesh: Mesh, shape: tuple[int, int], most: int, held: int, limit: int | None) -> int:
    """In how few parts rows can go through a model without gradients, a divisor of `most`.

    Args:
      model: of which one layer's arrays are there at a time.
      mesh: of training.
      shape: of the rows, [B, T].
      most: parts.
      held: bytes on each device meanwhile.
      limit: bytes there, of whose rest half is counted on; None: not known, `most` parts.
    """
    if limit is None:
        return most
    of_all = shape[0] * shape[1] * _of_a_token(model) // batch_shards(mesh)
    room = (_SPARE * limit - held) / 2
    return next((n for n in range(1, most) if most % n == 0 and of_all / n <= room), most)


def _of_a_token(model: Model) -> int:
    """Bytes of what a layer computes of a token, and of what goes from layer to layer, with copies to spare."""
    return jnp.dtype(model.config.dtype).itemsize * (3 * model.config.mlp_dim + 8 * model.config.embed_dim)


def lay_out(model: Model, params: Params, mesh: Mesh | None = None) -> Params:
    """Parameters as decoding reads them: split by layer, in the compute dtype, whole but for `tensor`.

    Once for all tokens, in place of slicing, rounding and gathering them for each.  The ambient mesh is where they are
    laid out.

    Args:
      model: the policy.
      params: its parameters, on the ambient mesh or on none.
      mesh: of training, where the ambient mesh is another one.
    """
    arrays = cache_arrays(model.config.num_layers)
    ends = {name: part for name, part in params.items() if name != "layers"}
    # A program for each layer, the same one: in one of all layers compilers hold gathered layers twice.
    laid = lay_out_ends(model, ends, mesh=mesh)
    if model.config.cuts is None:
        layers = (lay_out_layer(model, params["layers"], np.int32(i), arrays=arrays, mesh=mesh) for i in range(arrays))
    else:
        own = (stacks.every(params["layers"], i, arrays) for i in range(arrays))
        layers = (lay_out_layer(model, layer, np.int32(0), arrays=1, mesh=mesh) for layer in own)
    return laid | {"layers": tuple(layers)}


@functools.partial(jit, static_argnames=("model", "mesh"))
def lay_out_ends(model: Model, ends: Params, *, mesh: Mesh | None) -> Params:
    own = model.config.token_rows
    ends = ends if own is None else own.merged(ends, model.config.dtype)
    return jax.tree_util.tree_map_with_path(functools.partial(_place, model, mesh, lambda x: x), ends)


@functools.partial(jit, static_argnames=("model", "arrays", "mesh"))
def lay_out_layer(model: Model, layers: Params, number: Array, *, arrays: int, mesh: Mesh | None) -> Params:
    """What `split_layers` gives of one number; an adapter is merged into its kernels, unless these are quantised."""

    def cut(x):
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, arrays, *x.shape[1:]), number, axis=1, keepdims=False)

    def alone(x):
        return x.squeeze(0) if len(x) == 1 else x

    own = jax.tree.map(cut, layers)
    if model.config.adapter is not None and model.config.quantised is None:
        own = model.config.adapter.merged(own, cut, model.config.dtype)
    return jax.tree_util.tree_map_with_path(functools.partial(_place, model, mesh, alone), own)


def _place(model: Model, mesh: Mesh | None, cut: Callable[[Array], Array], path: Any, x: Array) -> Array:
    """A parameter, or a part of it, whole but for `tensor`."""
    name, there, shape = path_name(path), jax.sharding.get_abstract_mesh(), x.shape
    x = cut(x)
    # Norms work in their own precision; adapters beside quantised kernels stay what training has.
    if not name.endswith("scale") and kernel_at(name) is None and not is_adapter(name):
        x = x.astype(model.config.dtype)
    if there.empty:
        return x
    own = param_spec(name, shape, there)  # type: ignore[arg-type]
    steps = [own, without_fsdp(own)]
    if mesh is not None and dict(mesh.shape) != dict(there.shape):
        steps.insert(0, _finer(param_spec(name, shape, mesh)))
    for spec in steps:  # where it is, then from rows to heads, then gathered: cast by then, half as much moves
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(*spec[-x.ndim :]))
    return x
