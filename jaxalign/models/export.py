"""Parameters to a Hugging Face checkpoint: a directory that transformers, PEFT and vLLM load."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.files import is_url
from jaxalign.disk import writing
from jaxalign.errors import InputError
from jaxalign.models import stacks, store
from jaxalign.models.adapter import LEAVES, Update, is_adapter
from jaxalign.models.config import ModelConfig
from jaxalign.models.gather import on_host
from jaxalign.models.hf_names import Fused, Index, sizes
from jaxalign.models.hub import (
    ADAPTER_CONFIG,
    CONFIG,
    DESCRIPTIONS,
    GENERATION_CONFIG,
    LICENCE_FILES,
    TOKENIZER_FILES,
    file_of,
    locate,
    tokenizer_home,
)
from jaxalign.models.peft import WEIGHTS
from jaxalign.models.peft_export import plan_adapter
from jaxalign.models.quantised import kernel_at, quantised
from jaxalign.models.token_rows import EMBEDDING, TokenRows, table_of
from jaxalign.models.transformer import Model
from jaxalign.models.weights import DTYPES, MAX_BYTES, PRODUCER, Planned, producer_of, write_file, write_tensors
from jaxalign.ops.low_rank import LowRank, merged
from jaxalign.ops.quantised import dequantise
from jaxalign.ops.trees import by_path
from jaxalign.types import Params

CARD = "README.md"
_CARD_MARK = b"made with jaxalign"  # in a card that an export may replace


def save(
    directory: str | Path,
    model: Model,
    params: Params,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    card: str | None = None,
    max_bytes: int = MAX_BYTES,
    base: str | None = None,
    base_revision: str | None = None,
) -> Any:
    """Writes a directory that `transformers` loads, whole or not at all: a model, or an adapter in PEFT's form.

    Every process calls it: one tensor at a time is gathered from all of them, and process 0 writes.

    Args:
      directory: where, on disk or a URL that fsspec knows; replaced only where it is empty or an earlier export.
      model: of the parameters; a model with a scalar head becomes a sequence classifier.
      params: the parameters, sharded or not; an adapter among them is merged into its kernels.
      source: the directory or hub id the model came from: its tokenizer, generation config and licence are copied.
      tokenizer: a loaded tokenizer, saved instead of the source's files (it may have another chat template).
      dtype: of the weights in the file; None: that of the parameters.
      card: text of the model card, `README.md`.
      max_bytes: of one file, beyond which the weights are sharded.
      base: the model that `params` were trained beside, a directory or a hub id, where an adapter in PEFT's form is
        wanted; then `params` are the trained ones alone. None: a whole model.
      base_revision: of a hub id.

    Returns:
      The directory: a Path, or the URL as it was given.

    Raises:
      InputError: something else lies there, or parameters for which PEFT has no form.
    """
    url = os.fspath(directory) if is_url(os.fspath(directory)) else None
    target = Path(directory).expanduser().absolute()  # not used with a URL
    writes = jax.process_index() == 0
    leaf_types = [leaf.dtype for path, leaf in by_path(params).items() if base or not _beside(path)]
    leaf_type = jax.numpy.result_type(*leaf_types)  # as exact as what was trained
    try:
        file_type = np.dtype(leaf_type if dtype is None else jax.numpy.dtype(dtype))
    except TypeError:
        file_type = None
    if file_type is None or file_type not in DTYPES.values():  # numpy takes None for float64
        raise InputError(
            f"dtype {file_type or dtype}", f"one of {', '.join(str(d) for d in DTYPES.values())}", "dtype='float32'"
        )
    check_target(url or target)
    if url:
        part = Path(tempfile.gettempdir()) / f"jaxalign-export-{os.getuid()}-{os.getpid()}"
    else:
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with writing(url or target), _scratch(part if writes else None):
        if base is None:
            write_tensors(part if writes else None, dict(_planned(model, params)), file_type, max_bytes)
        else:
            told, tensors = plan_adapter(model, params, base=base, revision=base_revision)
            write_file(part / WEIGHTS if writes else None, tensors, file_type)
        if writes:
            _copy(None if source is None else locate(source, weights=False), tokenizer, part, whole=base is None)
            if base is None:
                told = hf_config(model, file_type, _pad_id(model, tokenizer, part))
            file = part / (CONFIG if base is None else ADAPTER_CONFIG)
            file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
            if card is not None:
                (part / CARD).write_text(card, encoding="utf-8")
            if url:
                store.upload(part, url)
            else:
                _replace(part, target)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxalign export {url or target}")
    return url or target


def hf_config(model: Model, file_type: np.dtype, pad_token_id: int | None) -> dict[str, Any]:
    """The `config.json` of an export: the source's own fields, and what the weights changed.

    Args:
      model: what is exported.
      file_type: of the weights in the file.
      pad_token_id: for a scalar head, the id after which transformers looks for the last token of a row.
    """
    config = model.config.hf
    tokens = model.config.score_bias is not None
    if model.config.added is not None:
        config["vocab_size"] = model.config.vocab_size
    config["architectures"] = [model.config.family.architectures["tokens" if tokens else model.config.head]]
    for field in ("dtype", "torch_dtype"):  # transformers 5, and older
        config[field] = str(file_type)
    if model.config.head == "score":
        if model.config.num_labels is None:  # others keep the names that they came with
            config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config["pad_token_id"] = pad_token_id
    return config


def only_here(config: ModelConfig) -> str:
    """What to say of an export that transformers has no class for; "" where it has one."""
    family = config.family
    if config.head not in family.only_here:
        return ""
    kind = {"lm": "causal language model", "score": "sequence classifier"}[config.head]
    return f"transformers has no {kind} of {family.name}: jaxalign alone loads this export"


def check_target(target: str | Path) -> None:
    """Makes sure that nothing is lost by writing an export there.

    Args:
      target: a path, or a URL.

    Raises:
      InputError: a file, or a directory with anything but an earlier export in it.
    """
    read: Callable[[str], IO[bytes]]
    if is_url(url := os.fspath(target)):
        there = list(store.list_files(url))
        read = functools.partial(store.open_file, url)
    else:
        target = Path(target).expanduser().absolute()
        if target.exists() and not target.is_dir():
            raise _taken(target, "is a file")
        there = [file.name for file in target.iterdir()] if target.is_dir() else []
        read = lambda name: (target / name).open("rb")  # noqa: E731
    weights = {name for name in there if _is_own_weights(name, read)}
    own = {*DESCRIPTIONS, GENERATION_CONFIG, *TOKENIZER_FILES, *LICENCE_FILES} | weights if weights else set()
    if CARD in there and weights:
        with read(CARD) as card:
            own |= {CARD} if _CARD_MARK in card.read() else set()
    if foreign := sorted(set(there) - own):
        raise _taken(
            target, f"holds {', '.join(foreign[:3])}{' and more' * bool(foreign[3:])}, not written by jaxalign"
        )


def _taken(target: str | Path, found: str) -> InputError:
    return InputError(
        f"{target} {found}",
        "an empty or new directory, or an earlier export",
        f"another directory, such as {os.fspath(target).rstrip('/')}-2",
    )


def _is_own_weights(name: str, read: Callable[[str], IO[bytes]]) -> bool:
    if name == "model.safetensors.index.json":
        return True
    if not name.endswith(".safetensors"):
        return False
    with read(name) as file:
        return producer_of(file, name) == PRODUCER


@contextlib.contextmanager
def _scratch(directory: Path | None) -> Iterator[None]:
    """A new directory that is gone after the block, unless it was renamed."""
    if directory is None:
        yield
        return
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _replace(part: Path, target: Path) -> None:
    """Puts a finished directory in its place; a reader sees the old one or the new one, never a mixture."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path | None, tokenizer: Any, part: Path, whole: bool) -> None:
    """The files beside the weights; an adapter's generation config is its base's."""
    if tokenizer is not None:
        # Several templates by name stay in tokenizer_config.json: an export is one flat directory.
        named = isinstance(getattr(tokenizer, "chat_template", None), dict)
        tokenizer.save_pretrained(part, **({"save_jinja_files": False} if named else {}))
    if source is None:
        return
    files = [file_of(source, name) for name in (*([GENERATION_CONFIG] if whole else []), *LICENCE_FILES)]
    files += [tokenizer_home(source) / name for name in TOKENIZER_FILES] if tokenizer is None else []
    for file in files:
        if file.is_file():
            shutil.copyfile(file, part / file.name)


def _pad_id(model: Model, tokenizer: Any, part: Path) -> int | None:
    """An id that no real token of a row has, so that transformers pools a score at the last real one.

    The config's own where it differs from BOS and EOS, else the tokenizer's by the same rule. Without one, None:
    transformers then scores rows one by one and refuses a batch, instead of pooling at the wrong place.
    """
    if model.config.head != "score":
        return None
    hf = model.config.hf
    ends: set[int] = set()
    for value in (hf.get("bos_token_id"), hf.get("eos_token_id")):
        ends |= set(value) if isinstance(value, list) else {value}
    found = hf.get("pad_token_id")
    if found is not None and found not in ends:
        return found
    if tokenizer is None and any((part / name).is_file() for name in TOKENIZER_FILES):
        from jaxalign.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(part)
    found = None if tokenizer is None else tokenizer.pad_token_id
    return None if found in ends or (tokenizer is not None and found == tokenizer.eos_token_id) else found


def _planned(model: Model, params: Params) -> Iterator[tuple[str, Planned]]:
    """Every tensor by its Hugging Face name, layer by layer, in the order of the table."""
    names, dims = model.config.family.names, sizes(model.config)
    leaves = _with_updates(model, _whole(model, stacks.leaves(params, model.config.num_layers)))
    leaves = _with_token_rows(model, leaves)
    for path in leaves:
        names.row_of(path)
    for fused, index in names.in_order({path: leaf.shape for path, leaf in leaves.items()}):
        make = functools.partial(_gather, fused, [leaves[row.path] for row in fused.rows], index, dims)
        yield fused.rows[0].named(index), Planned(fused.shape(dims), make)


def _beside(path: str) -> bool:
    """Whether a parameter is merged into a kernel, or part of one in few bits."""
    return is_adapter(path) or kernel_at(path) is not None


class _Dequantised(NamedTuple):
    """A kernel that lies there in few bits."""

    parts: dict[str, Any]
    path: str  # of its linear, in a layer
    config: ModelConfig

    @property
    def shape(self) -> tuple[int, ...]:
        codes = self.parts["kernel_codes"]
        own = jax.ShapeDtypeStruct(codes.shape[1:], codes.dtype)
        return (codes.shape[0], *quantised({"kernel_codes": own}, self.path, self.config.embed_dim).shape)

    def on_host(self, index: Index) -> np.ndarray:
        """That of one layer, in float32."""
        own = {name: jnp.asarray(on_host(x, index)) for name, x in self.parts.items()}
        here = dataclasses.replace(quantised(own, self.path, self.config.embed_dim), gathered=None)
        return np.asarray(dequantise(here, jnp.float32))


def _whole(model: Model, leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by path, kernels in place of their parts."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if (kernel := kernel_at(path)) is None:
            found[path] = leaf
        else:
            linear = kernel.removeprefix("layers/").removesuffix("/kernel")
            found.setdefault(kernel, _Dequantised({}, linear, model.config)).parts[path.rpartition("/")[2]] = leaf
    return found


class _Updated(NamedTuple):
    """A kernel with the update that is merged into it."""

    kernel: Any
    update: Update
    lora_a: Any
    lora_b: Any
    magnitude: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def on_host(self, index: Index) -> np.ndarray:
        """That of one layer, in at least float32; where the layer has no update, as it is."""
        kernel, (layer, *_) = _on_host(self.kernel, index), index
        a, b, magnitude = (None if x is None else jnp.asarray(on_host(x, index)) for x in self[2:])
        if not self.update.ranks[layer] or a is None or b is None:
            return kernel
        return np.asarray(merged(kernel, LowRank(a, b * self.update.scales[layer], magnitude)))


def _with_updates(model: Model, leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by path, those of an adapter beside their kernel's own."""
    found = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path, update in model.config.adapter.updates if model.config.adapter else ():
        own = {name: leaves[f"layers/{path}/{name}"] for name in LEAVES if f"layers/{path}/{name}" in leaves}
        if own:
            found[f"layers/{path}/kernel"] = _Updated(leaves[f"layers/{path}/kernel"], update, **own)
    return found


class _WithRows(NamedTuple):
    """A table with the vectors of some tokens that lie beside it."""

    path: str
    table: Any
    rows: Any
    own: TokenRows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def on_host(self, index: Index) -> np.ndarray:
        """All of it, in the wider type of the two."""
        table, rows = on_host(self.table, index), on_host(self.rows, index)
        table = table.astype(np.promote_types(table.dtype, rows.dtype), copy=True)
        (table if self.path == EMBEDDING else table.T)[self.own.ids(self.path)] = rows
        return table


def _with_token_rows(model: Model, leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by path, vectors of some tokens in their tables."""
    found = {path: leaf for path, leaf in leaves.items() if table_of(path) is None}
    for path in leaves.keys() - found.keys():
        table, own = table_of(path), model.config.token_rows
        if table is not None and own is not None:
            found[table] = _WithRows(table, found[table], leaves[path], own)
    return found


def _on_host(leaf: Any, index: Index) -> np.ndarray:
    return leaf.on_host(index) if isinstance(leaf, (_Dequantised, _Updated, _WithRows)) else on_host(leaf, index)


def _gather(fused: Fused, leaves: list[Any], index: Index, dims: dict[str, int]) -> np.ndarray:
    """One tensor on the host, in Hugging Face's layout."""
    arrays = [_on_host(leaf, index) for leaf in leaves]
    return fused.whole([row.to_theirs(array, dims) for row, array in zip(fused.rows, arrays, strict=True)], dims)
