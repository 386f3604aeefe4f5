"""Hugging Face checkpoints to parameters: weights stream from safetensors straight into their shards."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxalign.errors import InputError
from jaxalign.models import peft, stacks
from jaxalign.models.added_tokens import Added
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.export import save as save  # the other direction: callers import both from here
from jaxalign.models.gather import on_host
from jaxalign.models.hf_names import Fused, Index, Row, sizes
from jaxalign.models.hub import base_of, is_adapter_dir, locate
from jaxalign.models.quantised import dequantised, kernel_at, parts_of, read_parts
from jaxalign.models.text_part import text_tensors
from jaxalign.models.token_rows import TokenRows, table_of
from jaxalign.models.transformer import Model
from jaxalign.models.weights import DTYPES, Tensor, all_finite, list_tensors
from jaxalign.ops.trees import from_paths, split
from jaxalign.types import Params

_EMBEDDING, _HEAD, _SCORE = "embed/embedding", "lm_head/kernel", "score/kernel"
_READERS = min(8, os.cpu_count() or 1)  # layers copied at once: transposing them is what loading waits for

Shardings = Callable[[Params], Any] | None
Wanted = Callable[[str], bool] | None


def load(
    path: str | Path,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    revision: str | None = None,
    head: str | None = None,
    rope_length: int | None = None,
    quantised: str | None = None,
    added: Added | None = None,
    cuts: stacks.Cuts = None,
    token_rows: TokenRows | None = None,
    shardings: Shardings = None,
    key: jax.Array | None = None,
    wanted: Wanted = None,
) -> tuple[Model, Params]:
    """Reads a checkpoint, or an adapter in PEFT's form merged into its base.

    Args:
      path: a directory in Hugging Face form, on disk or at a URL, or a hub id.
      dtype: of the computation.
      param_dtype: of the parameters; the file's numbers are converted while they are read.
      remat: what the backward pass recomputes: none, dots, attention, offload or full.
      revision: of a hub id.
      head: "lm", "score", or None for what the checkpoint is. "score" on a causal language model drops its token head
        and starts a scalar one.
      rope_length: of the longest sequence, for the rope types that depend on it, see `ops.rope.Rope`.
      quantised: "int8" or "nf4": the layers' kernels take so few bits, quantised layer by layer; None: as the others.
      added: tokens that it has no vectors of, which start as the mean of the others.
      cuts: layers at which another stack begins, of a checkpoint that is no adapter; None: there is one stack.
      token_rows: tokens whose vectors are a parameter of their own, of a checkpoint that is no adapter; None: none.
      shardings: from the abstract parameters to a tree of shardings; None: the first local device.
      key: of a new scalar head; None: the checkpoint must have one.
      wanted: which parameters, by path; None: all.

    Returns:
      The model and its parameters.

    Raises:
      InputError: a config field that is not honoured, a key that is unknown, missing, twice or of another shape.
    """
    directory = locate(path, revision)
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    config = read_config(directory, head=head, rope_length=rope_length, **settings)
    config = dataclasses.replace(config.with_added(added), quantised=quantised, cuts=cuts, token_rows=token_rows)
    model = Model(config)
    leaves = {}
    for leaf_path, sharding, array in read_leaves(directory, config, model.abstract(), shardings, wanted):
        if array is None and key is None:
            raise _no_head(directory, config)
        if array is None:
            array = jax.jit(lambda k: model.init(k)["score"]["kernel"], out_shardings=sharding)(key)
        leaves[leaf_path] = array
    return model, from_paths(leaves)


def read_leaves(
    directory: Path, config: ModelConfig, abstract: Params, shardings: Shardings = None, wanted: Wanted = None
) -> Iterator[tuple[str, Sharding, jax.Array | None]]:
    """Reads a tree of parameters, one array at a time.

    Args:
      directory: of the checkpoint, or of an adapter, which is merged into what its base holds.
      config: of the model, whose family names the tensors.
      abstract: shapes and dtypes.
      shardings: from the abstract parameters to a tree of shardings; None: the first local device.
      wanted: which parameters, by path; None: all.

    Yields:
      path, sharding and array of each of them; None for a scalar head that the checkpoint lacks.

    Raises:
      InputError: as `load` does.
    """
    tensors, saved = _listed(directory, config)
    whole, dims = abstract, sizes(config.without_added())
    if config.quantised is not None:
        kernels = functools.partial(dequantised, length=config.embed_dim, dtype=np.float32)
        whole = abstract | {"layers": jax.eval_shape(kernels, abstract["layers"])}
    whole = split(whole, lambda leaf_path: table_of(leaf_path) is None)[0]
    sources, names = match(config, stacks.uncut(whole), tensors), config.family.names
    # Where a kernel takes fewer bits, what takes its place, and what it is quantised from.
    places = {path: (leaf, sharding) for path, leaf, sharding in _leaves(abstract, shardings)}
    kernels_at = {path: (leaf, sharding) for path, leaf, sharding in _leaves(whole, shardings)}

    def read(leaf_path: str, leaf: Any, sharding: Sharding) -> jax.Array:
        leaf_path, first, _ = stacks.place(leaf_path)
        row, found = names.row_of(leaf_path), sources[leaf_path]
        fused = names.fused_of(row)
        added = config.added if "V" in row.dims else None
        if saved is None or not peft.changes(saved, leaf_path):
            return _read_leaf(row, fused, found, dims, leaf, sharding, added, first)
        # As exact as the files, so that the sum is rounded once.
        wide = functools.reduce(np.promote_types, (DTYPES[t.dtype] for t in found.values()), leaf.dtype)
        kernel = _read_leaf(row, fused, found, dims, jax.ShapeDtypeStruct(leaf.shape, wide), sharding, added)
        return peft.merge(saved, leaf_path, kernel, leaf.dtype, sharding)

    for leaf_path, (leaf, sharding) in places.items():
        if wanted is not None and not wanted(leaf_path):
            continue
        kernel, table = kernel_at(leaf_path), table_of(leaf_path)
        if table is not None:
            row, ids = names.row_of(table), config.token_rows.ids(table)
            yield leaf_path, sharding, _read_vectors(row, sources[table][()], ids, leaf, sharding, config.added)
        elif kernel is None:
            there = stacks.place(leaf_path).path in sources
            yield leaf_path, sharding, read(leaf_path, leaf, sharding) if there else None
        elif leaf_path.endswith("_codes"):  # the kernel's other parts with them
            if saved is not None and peft.changes(saved, kernel):
                layer, readers = functools.partial(on_host, read(kernel, *kernels_at[kernel])), 1
            else:
                row = names.row_of(kernel)
                layer = functools.partial(_read_kernel, row, names.fused_of(row), sources[kernel], dims)
                readers = _READERS
            parts = {path: places[path] for path in parts_of(kernel, config.quantised)}
            for path, array in read_parts(layer, kernel, config.quantised, parts, readers).items():
                yield path, places[path][1], array


def _listed(directory: Path, config: ModelConfig) -> tuple[Mapping[str, Tensor], peft.Saved | None]:
    """The tensors of a checkpoint; of an adapter those of its base, in whose place it may have its own."""
    if not is_adapter_dir(directory):
        return list_tensors(directory), None
    saved = peft.read(directory, config.without_added())
    return {**text_tensors(list_tensors(base_of(directory))), **saved.tensors}, saved


def check_numbers(path: str | Path, *, dtype: str, head: str) -> None:
    """Makes sure that `load` will take a checkpoint whose turn comes late: every tensor is read once, none is kept.

    Args:
      path: as `load` takes it.
      dtype: of the parameters.
      head: "lm" or "score".

    Raises:
      InputError: as `load` does.
    """
    directory = locate(path)
    config = read_config(directory, dtype=dtype, param_dtype=dtype, remat="none", head=head)
    abstract = Model(config).abstract()
    sources = match(config, abstract, _listed(directory, config)[0])
    for leaf_path, leaf, _ in _leaves(abstract, None):
        if leaf_path not in sources:
            raise _no_head(directory, config)
        row = config.family.names.row_of(leaf_path)
        for index, tensor in sources[leaf_path].items():
            whole = config.family.names.fused_of(row).part(row, tensor.read(), sizes(config))
            with np.errstate(over="ignore"):  # checked and reported below
                numbers = np.ascontiguousarray(whole.astype(leaf.dtype))
            _check_finite(numbers, tensor, row.named(index))


def _no_head(directory: Path, config: ModelConfig) -> InputError:
    return InputError(
        f"no {config.family.names.row_of(_SCORE).name} in {directory}",
        f"a reward model: {config.family.architectures['score']} with one label",
        "the export of a reward stage, or such a checkpoint",
    )


def check(directory: Path, config: ModelConfig) -> None:
    """Makes sure that a checkpoint holds the tensors that its config describes: headers alone are read.

    Raises:
      InputError: as `load` does, but for numbers that are not finite.
    """
    match(config, Model(config).abstract(), _listed(directory, config)[0])


def from_scratch(
    path: str | Path,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    key: jax.Array,
    revision: str | None = None,
    head: str | None = None,
    rope_length: int | None = None,
    quantised: str | None = None,
    added: Added | None = None,
    cuts: stacks.Cuts = None,
    token_rows: TokenRows | None = None,
    shardings: Shardings = None,
    wanted: Wanted = None,
) -> tuple[Model, Params]:
    """Starts a model from its `config.json` alone: kernels normal(0, initializer_range), norms 1, biases 0.

    Args and returns are `load`'s; each parameter is made on the devices that hold it.
    """
    directory = locate(path, revision, weights=False)
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    config = read_config(directory, head=head, rope_length=rope_length, **settings)
    config = dataclasses.replace(config.with_added(added), quantised=quantised, cuts=cuts, token_rows=token_rows)
    model = Model(config)
    chosen = wanted or (lambda leaf_path: True)
    out = from_paths({p: sharding for p, _, sharding in _leaves(model.abstract(), shardings) if chosen(p)})
    return model, jax.jit(lambda key: split(model.init(key), chosen)[0], out_shardings=out)(key)


def match(config: ModelConfig, abstract: Params, tensors: Mapping[str, Tensor]) -> dict[str, dict[Index, Tensor]]:
    """Which tensors make up each parameter, every key of the checkpoint accounted for.

    Args:
      config: of the model.
      abstract: its parameters.
      tensors: of the checkpoint, by name.

    Returns:
      For each path of a parameter its tensors by index, of layers and experts where it is stacked. Only a scalar head
      may lack.

    Raises:
      InputError: naming the first key that is unknown, missing, mis-shaped or of a type that cannot be read.
    """
    names, dims = config.family.names, sizes(config.without_added())
    tensors = _tied_under_its_own_name(config, _by_own_names(config, text_tensors(tensors)))
    counts = {
        leaf_path: leaf.shape[: names.row_of(leaf_path).stacked] for leaf_path, leaf, _ in _leaves(abstract, None)
    }
    found: dict[str, dict[Index, Tensor]] = {leaf_path: {} for leaf_path in counts}
    for name, tensor in tensors.items():
        fused, index = names.find(name) or (Fused(()), ())
        within = [all(map(operator.lt, index, counts[row.path])) for row in fused.rows if row.path in counts]
        if not within or not all(within) or len(within) < len(fused.rows):
            if names.is_harmless(name) or (name == _name(config, _HEAD) and _headless(config, tensors)):
                continue
            raise InputError(
                f"{name} in {tensor.file}, which this model does not have",
                f"the tensors of a {config.num_layers}-layer {'tied ' if config.tied else ''}"
                f"{config.family.name} with a {'scalar' if config.head == 'score' else 'token'} head",
                "a config.json that describes these weights, or weights without it",
            )
        if tensor.shape != fused.shape(dims):
            raise InputError(
                f"{name} of shape {tensor.shape} in {tensor.file}",
                f"{fused.shape(dims)}, as config.json says",
                "a config.json that describes these weights",
            )
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{name} of type {tensor.dtype} in {tensor.file}",
                f"one of {', '.join(DTYPES)}",
                "an unquantised copy of the checkpoint",
            )
        for row in fused.rows:
            found[row.path][index] = tensor
    complete = {}
    for leaf_path, parts in found.items():
        wanted = list(itertools.product(*map(range, counts[leaf_path])))
        missing = [names.row_of(leaf_path).named(index) for index in wanted if index not in parts]
        if leaf_path == _SCORE and missing:
            continue
        if missing:
            raise InputError(
                f"no {missing[0]} among the weights" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
                "every tensor that config.json asks for",
                "a whole checkpoint, or a config.json that describes it",
            )
        complete[leaf_path] = {index: parts[index] for index in wanted}
    return complete


def _by_own_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by the names of the family's table."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (own := config.family.names.own(name)) in found:
            raise InputError(
                f"{name} and another {own} among the weights", "each tensor once", "the checkpoint without one of them"
            )
        found[own] = tensor
    return found


def _name(config: ModelConfig, leaf_path: str) -> str:
    """Of the one tensor of a parameter that is not stacked."""
    return config.family.names.row_of(leaf_path).name


def _tied_under_its_own_name(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A model whose head is its embedding may store the one matrix under the head's name."""
    head, embedding = _name(config, _HEAD), _name(config, _EMBEDDING)
    if not config.tied or head not in tensors or embedding in tensors:
        return tensors
    return {embedding if name == head else name: tensor for name, tensor in tensors.items()}


def _headless(config: ModelConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a token head may be left unread: a scalar head takes its place, or it repeats the embedding."""
    if config.head == "score":
        return True
    head, embedding = tensors[_name(config, _HEAD)], tensors.get(_name(config, _EMBEDDING))
    if embedding is None or not config.tied:
        return True  # the missing embedding is reported by its own name
    if head.shape == embedding.shape and np.array_equal(head.read(), embedding.read()):
        return True
    raise InputError(
        f"{_name(config, _HEAD)} in {head.file} differs from {_name(config, _EMBEDDING)}",
        "the same numbers, since tie_word_embeddings is true",
        '"tie_word_embeddings": false in config.json',
    )


def _read_leaf(
    row: Row,
    fused: Fused,
    tensors: dict[Index, Tensor],
    dims: dict[str, int],
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding,
    added: Added | None = None,
    layer: int = 0,
) -> jax.Array:
    """One parameter, each device's part read on its own; one that has vectors of tokens, with those of added ones.

    `layer` is the first of its stack.
    """
    mean = None if added is None else added.mean(fused.part(row, tensors[()].read(), dims))  # theirs is [V, D]

    @functools.cache  # devices that hold the same part share one array
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        within = tuple(slice(*b) for b in bounds[row.stacked :])

        def copy(at: Index) -> None:
            index = tuple(i + start + n for i, (start, _), n in zip(at, bounds, (layer, 0), strict=False))
            with np.errstate(over="ignore"):  # checked and reported below
                source = row.to_ours(fused.part(row, tensors[index].read(), dims), dims)
                if added is None or mean is None:
                    out[at] = source[within]
                elif row.dims.endswith("VD"):
                    added.write(out, source, within, mean)
                else:
                    added.write(out.T, source.T, within[::-1], mean)
            _check_finite(out[at], tensors[index], row.named(index))

        places = list(itertools.product(*(range(n) for n in out.shape[: row.stacked])))
        with ThreadPoolExecutor(min(_READERS, len(places))) as pool:
            list(pool.map(copy, places))
        return out

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)))

    # Waits, so that the host's copy of this parameter is gone before the next one is read.
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))


def _read_vectors(
    row: Row, tensor: Tensor, ids: np.ndarray, leaf: jax.ShapeDtypeStruct, sharding: Sharding, added: Added | None
) -> jax.Array:
    """Those of some tokens, [n, D], of a tensor [V, D]."""
    table = tensor.read()
    with np.errstate(over="ignore"):  # checked and reported below
        own = np.ascontiguousarray(table[ids] if added is None else added.vectors(table, ids), leaf.dtype)
    _check_finite(own, tensor, row.name)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda part: own[part])


def _read_kernel(row: Row, fused: Fused, tensors: dict[Index, Tensor], dims: dict[str, int], at: Index) -> np.ndarray:
    """One layer's, in float32."""
    kernel = np.ascontiguousarray(row.to_ours(fused.part(row, tensors[at].read(), dims), dims), np.float32)
    _check_finite(kernel, tensors[at], row.named(at))
    return kernel


def _check_finite(array: np.ndarray, tensor: Tensor, name: str) -> None:
    """Refuses weights that are no numbers, while they are at hand; training on them fails late and elsewhere."""
    if all_finite(array):
        return
    source = np.asarray(tensor.read()).astype(np.float64)
    nan, infinite = int(np.isnan(source).sum()), int(np.isinf(source).sum())
    if nan or infinite:
        raise InputError(
            f"{name} in {tensor.file} holds {nan} NaN and {infinite} infinite of {source.size} numbers",
            "finite weights",
            "an earlier or another checkpoint of this model; download it again if the hub's is whole",
        )
    raise InputError(
        f"{name} in {tensor.file} holds numbers as large as {np.abs(source).max():.3g}, beyond {array.dtype}",
        f"weights that {array.dtype} can hold",
        "--config.model.param_dtype=float32",
    )


def _leaves(abstract: Params, shardings: Shardings) -> list[tuple[str, jax.ShapeDtypeStruct, Sharding]]:
    """Path, shape and sharding of each parameter."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    if shardings is None:
        placed = [SingleDeviceSharding(jax.local_devices()[0])] * len(flat)
    else:
        placed = treedef.flatten_up_to(shardings(abstract))  # type: ignore[attr-defined]
    return [("/".join(k.key for k in p), leaf, s) for (p, leaf), s in zip(flat, placed, strict=True)]


def get_leaf(tree: Mapping, leaf_path: str) -> Any:
    """The array at a path such as `layers/mlp/up/kernel`."""
    for name in leaf_path.split("/"):
        tree = tree[name]
    return tree
