"""Which model something was made with: digests of parameters, of a description, of the files of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.data.cache import digest
from jaxalign.models import peft
from jaxalign.models.config import ModelConfig
from jaxalign.models.hub import ADAPTER_CONFIG, base_of, is_adapter_dir, read_json
from jaxalign.models.weights import Tensor, list_tensors
from jaxalign.ops.checksum import checksum
from jaxalign.parallel.sharding import path_name
from jaxalign.types import Params

# Fields of a description that leave its numbers what they are, but for rounding.
_HOW = frozenset({"initializer_range", "param_dtype", "remat", "cuts", "hf_config"})
_PLACES = frozenset({"base_model_name_or_path", "revision"})  # where an adapter's base is, which is digested itself
_SAMPLE = 4096  # bytes read at each of a tensor's places


def fingerprint(params: Params) -> str:
    """A digest of parameters' values, computed where they lie; the same on every mesh.

    Each leaf gives two sums over its bits, see `ops.checksum`.
    """
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: checksum(x)[:2], tree))(params))
    leaves = jax.tree_util.tree_flatten_with_path(sums, is_leaf=lambda x: isinstance(x, np.ndarray))[0]
    shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(params)]
    return digest(
        [[path_name(path), value.tolist(), shape] for (path, value), shape in zip(leaves, shapes, strict=True)]
    )


def describe(config: ModelConfig) -> str:
    """A digest of what a model computes with given parameters: rope, norm epsilon, heads, dtype of the computation."""
    fields = dataclasses.asdict(config)
    return digest(_stated({name: value for name, value in fields.items() if name not in _HOW}))


def _stated(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is None: a field that came later leaves the digests of models without it as they were."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return [of(each) for each in value]
        return _stated(value) if isinstance(value, dict) else value

    return {name: of(value) for name, value in fields.items() if value is not None}


def identify(directory: Path) -> str:
    """A digest of the weights in a model's directory, from headers and samples of every tensor: none is read whole.

    Of an adapter: its base's weights, its own, and its description.

    What is seen: name, type and shape of every tensor, and of its bytes the first 4,096, the last 4,096 and 4,096 in
    the middle; of a tensor of up to 12 KiB all. So a copy that was trained, merged or converted differs, since that
    changes nearly every number of some tensor. What is not seen: a change of other bytes alone, such as a few rows of
    an embedding or one number that was set by hand; how tensors are split over files; where the directory is.

    Args:
      directory: on this host, see `hub.locate`.

    Raises:
      InputError: no whole safetensors there.
    """
    h = hashlib.blake2b(digest_size=16)
    if is_adapter_dir(directory):
        h.update(identify(base_of(directory)).encode())
        told = {k: v for k, v in read_json(directory / ADAPTER_CONFIG).items() if k not in _PLACES}
        h.update(json.dumps(told, sort_keys=True).encode())
        tensors = peft.adapter_tensors(directory)
    else:
        tensors = list_tensors(directory)
    for name, tensor in sorted(tensors.items()):
        h.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for part in _samples(tensor):
            h.update(part)
    return h.hexdigest()


def _samples(tensor: Tensor) -> list[bytes]:
    with open(tensor.file, "rb") as file:
        found = []
        for start in sorted({0, max(0, (tensor.num_bytes - _SAMPLE) // 2), max(0, tensor.num_bytes - _SAMPLE)}):
            file.seek(tensor.offset + start)
            found.append(file.read(min(_SAMPLE, tensor.num_bytes - start)))
        return found
