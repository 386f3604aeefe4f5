"""Adapters in PEFT's form, `adapter_config.json` beside `adapter_model.safetensors`, read as the model's own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxalign.errors import InputError
from jaxalign.models import peft_tokens
from jaxalign.models.adapter import LEAVES, Adapter, Update
from jaxalign.models.config import ModelConfig
from jaxalign.models.hf_names import Fused, Row, sizes
from jaxalign.models.hub import ADAPTER_CONFIG, base_of
from jaxalign.models.hub import is_adapter_dir as is_adapter_dir
from jaxalign.models.peft_config import MERGE, PREFIX, PeftConfig, read_peft_config
from jaxalign.models.text_part import text_tensors
from jaxalign.models.token_rows import ENDS, TokenRows, leaf_of
from jaxalign.models.weights import DTYPES, Tensor, all_finite, list_file, list_tensors
from jaxalign.ops.low_rank import LowRank, merged
from jaxalign.ops.trees import by_path, from_paths
from jaxalign.types import Params

WEIGHTS = "adapter_model.safetensors"
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAME = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:(?<=vector)\.weight)?")


class Saved(NamedTuple):
    """An adapter as it was read."""

    adapter: Adapter
    leaves: Params  # float32 on the host, stacked [L, ...], zeros beyond a layer's rank; vectors of tokens [n, D]
    tensors: dict[str, Tensor]  # by Hugging Face's names: trained whole, they take the place of the base's
    token_rows: TokenRows | None = None  # tokens whose vectors it has, which take the place of the base's


class Lies(NamedTuple):
    """How the update of a kernel lies in PEFT's file: A [R, inputs], B [outputs, R], the magnitude [outputs]."""

    lora_a: Row
    lora_b: Row
    magnitude: Row

    @classmethod
    def of(cls, row: Row) -> Lies:
        """That of a kernel's row.

        >>> [part.dims for part in Lies.of(Row("q_proj.weight", "query/kernel", "(NH)D -> DNH"))]
        ['RD -> DR', '(NH)R -> RNH', '(NH) -> NH']
        """
        (their_in, our_in), (their_out, our_out) = row.sides()
        dims = (f"{their_out}R -> R{our_out}", f"{their_out} -> {our_out}")
        along = row.along if row.dims.startswith(their_out) else 0  # Conv1D's outputs lie last, and here first
        outputs = (dataclasses.replace(row, dims=d, along=along) for d in dims)
        return cls(dataclasses.replace(row, dims=f"R{their_in} -> {our_in}R", along=0, merged=1), *outputs)


def read(directory: Path, config: ModelConfig) -> Saved:
    """Reads an adapter.

    Args:
      directory: of the adapter, see `hub.locate`.
      config: of its model, as `read_config` gives it for this directory.

    Raises:
      InputError: an adapter of another kind or of another base, without its head, or with a tensor that is unknown,
        missing, mis-shaped or no number; it names the field or the tensor.
    """
    told = read_peft_config(directory / ADAPTER_CONFIG)
    found, whole, vectors = _sorted(directory, config)
    _check_whole(directory, config, told, whole)
    _check_targets(directory, config, told, found.keys())
    names, L = config.family.names, config.num_layers
    own: dict[str, dict[int, dict[str, np.ndarray]]] = {}  # by path and layer
    scales: dict[str, dict[int, float]] = {}
    for module, parts in found.items():
        fused, (layer,) = _linear(module, config)
        for row, arrays in zip(fused.rows, _read_update(module, fused, parts, told, config), strict=True):
            if arrays is None:
                continue
            own.setdefault(row.path, {})[layer] = arrays
            scales.setdefault(row.path, {})[layer] = told.scale(module)
    updates, leaves = [], {}
    for path in (row.path for row in names.rows if row.path in own):
        ranks = tuple(own[path][i]["lora_a"].shape[-1] if i in own[path] else 0 for i in range(L))
        usual = next(iter(scales[path].values()))  # a layer without an update has zeros: any scale is its own
        update = Update(ranks, tuple(scales[path].get(i, usual) for i in range(L)))
        updates.append((path.removeprefix("layers/").removesuffix("/kernel"), update))
        stacked = _stacked(own[path], update)
        if told.dora:
            stacked["magnitude"] = _magnitudes(own[path], names.row_of(path), config, directory)
        leaves |= {f"{path.removesuffix('/kernel')}/{name}": array for name, array in stacked.items()}
    tokens = peft_tokens.read(directory / WEIGHTS, config, told.fields[peft_tokens.FIELD], vectors)
    leaves |= {leaf_of(table): rows for table, (_, rows) in tokens.items()}
    token_rows = TokenRows.of({table: ids for table, (ids, _) in tokens.items()})
    return Saved(Adapter(tuple(updates), told.dora, told.rslora), from_paths(leaves), whole, token_rows)


def changes(saved: Saved, path: str) -> bool:
    """Whether the parameter at a path is a kernel with an update, or a table with vectors of its own."""
    if saved.token_rows is not None and saved.token_rows.ids(path) is not None:
        return True
    return any(path == f"layers/{own}/kernel" for own, _ in saved.adapter.updates)


def merge(saved: Saved, path: str, kernel: jax.Array, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """A kernel with its update added in at least float32, of float64 in that; layers without one keep their numbers.

    Of a table, with the adapter's vectors in it.

    Args:
      saved: the adapter.
      path: of the kernel.
      kernel: of all layers [L, ...].
      dtype: of the result.
      sharding: of the result.
    """
    leaves = by_path(saved.leaves)
    if path in ENDS and (own := saved.token_rows) is not None:
        put = jax.jit(lambda table, rows: own.joined(path, table.astype(dtype), rows), out_shardings=sharding)
        return put(kernel, leaves[leaf_of(path)])
    a, b, magnitude = (leaves.get(path.replace("kernel", name)) for name in LEAVES)
    update = dict(saved.adapter.updates)[path.removeprefix("layers/").removesuffix("/kernel")]

    def one(parts):
        kernel, a, b, magnitude, scale, rank = parts
        return jnp.where(rank > 0, merged(kernel, LowRank(a, b * scale, magnitude)), kernel).astype(dtype)

    numbers = np.array(update.scales, jnp.promote_types(dtype, jnp.float32)), np.array(update.ranks)
    # Layer by layer: all products at once would take as much memory again.
    add = jax.jit(lambda *parts: jax.lax.map(one, parts), out_shardings=sharding)
    return add(kernel, a, b, magnitude, *numbers)


def adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by the keys in its file.

    Raises:
      InputError: no such file, or not a whole one.
    """
    if not (directory / WEIGHTS).is_file():
        others = sorted(p.name for p in directory.glob("adapter_model*"))
        raise InputError(
            f"{', '.join(others) or 'no weights'} in {directory}",
            f"{WEIGHTS} beside {ADAPTER_CONFIG}",
            "save it again in PEFT: PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)",
        )
    return list_file(directory / WEIGHTS)


def _sorted(
    directory: Path, config: ModelConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the updates by module and part, those that were trained whole by name, vectors by module."""
    file = directory / WEIGHTS
    updates: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    tensors = adapter_tensors(directory)
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{key} of type {tensor.dtype} in {file}", f"one of {', '.join(DTYPES)}", MERGE)
        if not key.startswith(PREFIX):
            raise InputError(f"{key} in {file}", f"keys that begin with {PREFIX}", "save it again in PEFT")
    for name, tensor in text_tensors({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}).items():
        if match := _NAME.fullmatch(name):
            _check_linear(match[1], name, file, config)
            place, own = updates.setdefault(match[1], {}), match[2]
        elif name.endswith(peft_tokens.KEY):
            weight = config.family.names.own(f"{name.removesuffix(peft_tokens.KEY)}.weight")
            place, own = vectors, weight.removesuffix(".weight")
        elif ".lora_" in name or ".token_adapter." in name:
            expected = "low-rank updates of linears, vectors of tokens, and tensors that were trained whole"
            raise InputError(f"{PREFIX}{name} in {file}", expected, MERGE)
        else:  # a module's own bias lies beneath its update
            place, own = whole, config.family.names.own(name.replace(".base_layer.", "."))
        if own in place:
            found = f"{PREFIX}{name} and the same under another key in {file}"
            raise InputError(found, "each tensor under one key", "save it again in PEFT")
        place[own] = tensor
    return updates, whole, vectors


def _linear(module: str, config: ModelConfig) -> tuple[Fused, tuple[int, ...]] | None:
    """The rows of a linear of a layer, and the layer; None where the model has no such module."""
    fused, index = config.family.names.find(f"{module}.weight") or (None, ())
    if fused is None or fused.rows[0].stacked != 1 or not fused.rows[0].path.endswith("/kernel"):
        return None
    return (fused, index) if index[0] < config.num_layers else None


def _check_linear(module: str, name: str, file: Path, config: ModelConfig) -> None:
    """Refuses an update of what is no linear of a layer."""
    if _linear(module, config) is not None:
        return
    known = config.family.names.find(f"{module}.weight")
    raise InputError(
        f"{PREFIX}{name} in {file}",
        f"updates of the linears of a {config.num_layers}-layer {config.family.name}: {', '.join(_linears(config))}",
        MERGE if known and not known[1] else _another_base(file.parent),
    )


def _linears(config: ModelConfig) -> list[str]:
    """The last names of the modules that may have an update."""
    rows = [row for row in config.family.names.rows if row.stacked == 1 and row.path.endswith("/kernel")]
    return list(dict.fromkeys(row.name.split(".")[-2] for row in rows))


def _another_base(directory: Path) -> str:
    return f'the model that it was trained on: "base_model_name_or_path": "DIR" in {directory / ADAPTER_CONFIG}'


def _check_whole(directory: Path, config: ModelConfig, told: PeftConfig, whole: dict[str, Tensor]) -> None:
    """Makes sure that tensors that were trained whole are there, are the model's, and have its shapes."""
    names, dims, file = config.family.names, sizes(config), directory / WEIGHTS
    for name, tensor in whole.items():
        fused, index = names.find(name) or (None, ())
        if fused is None or any(i >= config.num_layers for i in index[:1]):
            expected = f"a tensor of a {config.num_layers}-layer {config.family.name}"
            raise InputError(f"{PREFIX}{name} in {file}", expected, _another_base(directory))
        if tensor.shape != (shape := fused.shape(dims)):
            raise InputError(
                f"{PREFIX}{name} of shape {tensor.shape} in {file}",
                f"{shape}, as its base's config.json says",
                f"{_another_base(directory)}; of a vocabulary that was made larger, {MERGE}",
            )
    heads = [names.row_of("score/kernel").name.removesuffix(".weight")] if told.scores else []
    modules = {row.name.removesuffix(".weight") for row in names.rows}
    for end in [*heads, *told.whole_modules]:
        if any(module.endswith(end) for module in modules) and not any(
            name.rpartition(".")[0].endswith(end) for name in whole
        ):
            raise InputError(
                f"no {PREFIX}...{end}.weight in {file}" if end not in heads else f"no {PREFIX}{end}.weight in {file}",
                f"{'the head' if end in heads else 'what'} that was trained beside the updates",
                "save it again in PEFT, with task_type and modules_to_save as in training",
            )
    both = [names.row_of(path).name for path in ("embed/embedding", "lm_head/kernel")]
    there = [name for name in both if name in whole]
    if config.tied and config.head == "lm" and len(there) == 1:
        other = next(name for name in both if name not in whole)
        raise InputError(
            f"{PREFIX}{there[0]} without {PREFIX}{other} in {file}",
            "both, the same: the head of the base is its embedding",
            "modules_to_save=['embed_tokens', 'lm_head'] and ensure_weight_tying=True in PEFT",
        )


def _check_targets(directory: Path, config: ModelConfig, told: PeftConfig, found) -> None:
    """Makes sure that the linears with an update are those that `adapter_config.json` names."""
    for row in config.family.names.rows:
        if row.stacked != 1 or not row.path.endswith("/kernel"):
            continue
        for layer in range(config.num_layers):
            module = row.named((layer,)).removesuffix(".weight")
            if told.targets(module, layer) and module not in found:
                raise InputError(
                    f"no {PREFIX}{module}.{PARTS['lora_a']} in {directory / WEIGHTS}",
                    f"updates of all that target_modules in {ADAPTER_CONFIG} names",
                    "the whole adapter: download or save it again",
                )
            if not told.targets(module, layer) and module in found:
                raise InputError(
                    f"{PREFIX}{module}.{PARTS['lora_a']} in {directory / WEIGHTS}",
                    f"updates of what target_modules in {ADAPTER_CONFIG} names alone: PEFT leaves others out",
                    "the adapter's own adapter_config.json",
                )


def _read_update(
    module: str, fused: Fused, parts: dict[str, Tensor], told: PeftConfig, config: ModelConfig
) -> list[dict[str, np.ndarray] | None]:
    """The update of one module in our layout, for each of the kernels that it is made of; None: it has none."""
    dims = sizes(config) | {"R": told.rank(module)}
    lies = [Lies.of(row) for row in fused.rows]
    whole = {name: Fused(tuple(getattr(lie, name) for lie in lies)) for name in ("lora_b", "magnitude")}
    wanted = {"lora_a": lies[0].lora_a.shape(dims), "lora_b": whole["lora_b"].shape(dims)}
    if told.dora:
        wanted["magnitude"] = whole["magnitude"].shape(dims)
    arrays = {}
    for name, shape in wanted.items():
        key = f"{PREFIX}{module}.{PARTS[name]}"
        file = next(iter(parts.values())).file
        if PARTS[name] not in parts:
            raise InputError(f"no {key} in {file}", "all parts of an update", "the whole adapter: save it again")
        tensor = parts[PARTS[name]]
        if tensor.shape != shape:
            raise InputError(
                f"{key} of shape {tensor.shape} in {file}",
                f"{shape}, as {ADAPTER_CONFIG} and its base's config.json say",
                f"the adapter's own {ADAPTER_CONFIG}, or {_another_base(file.parent)}",
            )
        arrays[name] = np.ascontiguousarray(tensor.read().astype(np.float32))
        if not all_finite(arrays[name]):
            raise InputError(f"{key} in {file} holds NaN or infinite numbers", "finite weights", "another adapter")
    if len(extra := parts.keys() - {PARTS[name] for name in wanted}):
        raise InputError(f"{PREFIX}{module}.{min(extra)} in {file}", "magnitudes where use_dora is true", MERGE)

    blocks = [whole["lora_b"].part(lie.lora_b, arrays["lora_b"], dims) for lie in lies]
    found: list[dict[str, np.ndarray] | None] = []
    for lie, block, columns in zip(lies, blocks, _columns(blocks, every=told.dora), strict=True):
        own = {"lora_a": arrays["lora_a"][columns], "lora_b": block[..., columns]}
        if told.dora:
            own["magnitude"] = whole["magnitude"].part(lie.magnitude, arrays["magnitude"], dims)
        ranked = dims | {"R": own["lora_a"].shape[0]}
        ours = {name: getattr(lie, name).to_ours(array, ranked) for name, array in own.items()}
        found.append(ours if ranked["R"] else None)
    return found


def _columns(blocks: Sequence[np.ndarray], *, every: bool) -> list[np.ndarray]:
    """Which columns of a fused B each of its parts has for its own: all of them, but where an export put them together.

    PEFT has one A for all parts, and an export to it each part's columns behind those of the part before. Read as they
    lie, ranks would grow with each export.

    >>> q, k, v = np.array([[3.0, 0, 0, 0]]), np.zeros((1, 4)), np.array([[0.0, 0, 5, 4]])
    >>> [own.tolist() for own in _columns([q, k, v], every=False)]
    [[0, 1], [], [2, 3]]
    >>> [own.tolist() for own in _columns([q, q], every=False)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]

    Args:
      blocks: B of each part [..., R].
      every: whether each part must have some: one without an update would have no magnitudes.
    """
    uses = np.stack([np.any(block.reshape(-1, block.shape[-1]), axis=0) for block in blocks])  # [parts, R]
    (there,) = np.nonzero(uses.any(axis=0))
    owners = uses.argmax(axis=0)
    mixed = uses.sum(axis=0).max() > 1 or np.any(np.diff(owners[there]) < 0)
    if len(there) == 0 or mixed or (every and not uses.any(axis=1).all()):
        return [np.arange(uses.shape[1]) for _ in blocks]
    before = np.searchsorted(there, np.arange(uses.shape[1]), side="right") - 1
    owners = owners[there[np.maximum(before, 0)]]  # a column of zeros goes to the part of the one before it
    return [np.flatnonzero(owners == part) for part in range(len(blocks))]


def _stacked(by_layer: dict[int, dict[str, np.ndarray]], update: Update) -> dict[str, np.ndarray]:
    """A and B of all layers."""
    one = next(iter(by_layer.values()))
    inputs, outputs = one["lora_a"].shape[:-1], one["lora_b"].shape[1:]
    a = np.zeros((len(update.ranks), *inputs, update.rank), np.float32)
    b = np.zeros((len(update.ranks), update.rank, *outputs), np.float32)
    for layer, own in by_layer.items():
        rank = update.ranks[layer]
        a[layer, ..., :rank], b[layer, :rank] = own["lora_a"], own["lora_b"]
    return {"lora_a": a, "lora_b": b}


def _magnitudes(
    by_layer: dict[int, dict[str, np.ndarray]], row: Row, config: ModelConfig, directory: Path
) -> np.ndarray:
    """Those of all layers; a layer without an update has the norms of its kernel, which change nothing."""
    found = {layer: own["magnitude"] for layer, own in by_layer.items()}
    missing = [layer for layer in range(config.num_layers) if layer not in found]
    tensors, dims = text_tensors(list_tensors(base_of(directory)) if missing else {}), sizes(config)
    fused, axes = config.family.names.fused_of(row), tuple(range(len(row.sides()[0][1])))
    for layer in missing:
        kernel = row.to_ours(fused.part(row, tensors[row.named((layer,))].read(), dims), dims)
        found[layer] = np.sqrt(np.square(kernel.astype(np.float32)).sum(axes))
    return np.stack([found[layer] for layer in range(config.num_layers)])
