"""Vectors of some tokens in PEFT's form: `trainable_token_indices`, and beside a module what takes their place."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import InputError
from jaxalign.models.config import ModelConfig
from jaxalign.models.gather import on_host
from jaxalign.models.peft_config import MERGE, PREFIX
from jaxalign.models.token_rows import EMBEDDING, ENDS, HEAD, leaf_of
from jaxalign.models.weights import Planned, Tensor, all_finite

FIELD = "trainable_token_indices"
KEY = ".token_adapter.trainable_tokens_delta"  # of the vectors themselves, though it is called a difference
_OWN = "the adapter's own adapter_config.json"


def module_of(config: ModelConfig, table: str) -> str:
    """What Hugging Face calls the module of a table."""
    return config.family.names.row_of(table).name.removesuffix(".weight")


def plan(config: ModelConfig, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Planned]]:
    """What `adapter_config.json` says of them, and the tensors by name; none where none are trained.

    Args:
      config: of the model.
      leaves: what was trained, by path.
    """
    told, tensors = {}, {}
    for table in ENDS:
        rows, own = leaves.get(leaf_of(table)), config.token_rows
        ids = None if own is None else own.ids(table)
        if rows is not None and ids is not None:
            module = module_of(config, table)
            told[module.rpartition(".")[2]] = ids.tolist()
            tensors[module + KEY] = Planned(rows.shape, functools.partial(on_host, rows, ()))
    return ({FIELD: told} if told else {}), tensors


def read(
    file: Path, config: ModelConfig, told: Any, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The ids, ascending, and the vectors [n, D] in float32, by table.

    Args:
      file: of the tensors.
      config: of the model.
      told: what `adapter_config.json` says.
      tensors: by module.

    Raises:
      InputError: tokens or vectors that are missing, unknown, twice there, of another shape, or no numbers.
    """
    tables = {module_of(config, t): t for t in ENDS if t == EMBEDDING or (config.head == "lm" and not config.tied)}
    head = module_of(config, HEAD)
    asked = told if isinstance(told, dict) else {} if told is None else {module_of(config, EMBEDDING): told}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, ids in asked.items():
        module = next((module for module in tables if f".{module}".endswith(f".{name}")), None)
        if module is None and config.tied and head.endswith(name) and ids in _others(asked, name):
            continue  # PEFT leaves it out: the head is the embedding
        if module is None:
            raise InputError(f"{FIELD} of {name!r} in {file.parent}", f"of {' or '.join(tables)}", MERGE)
        _check_ids(ids, config.vocab_size, file)
        if module not in tensors:
            expected = f"the vectors that {FIELD} names"
            raise InputError(
                f"no {PREFIX}{module}{KEY} in {file}", expected, "the whole adapter: download or save it again"
            )
        tensor, shape = tensors[module], (len(ids), config.embed_dim)
        if tensor.shape != shape:
            raise InputError(
                f"{PREFIX}{module}{KEY} of shape {tensor.shape} in {file}", f"{shape}, as {FIELD} says", _OWN
            )
        order = np.argsort(ids)
        rows = np.ascontiguousarray(tensor.read()[order].astype(np.float32))
        if not all_finite(rows):
            found_there = f"{PREFIX}{module}{KEY} in {file} holds NaN or infinite numbers"
            raise InputError(found_there, "finite weights", "another adapter")
        found[tables[module]] = np.array(ids)[order], rows
    if extra := [module for module in tensors if tables.get(module) not in found]:
        raise InputError(f"{PREFIX}{extra[0]}{KEY} in {file}", f"vectors of tokens that {FIELD} names", MERGE)
    return found


def _others(asked: Mapping[str, Any], name: str) -> list[Any]:
    return [ids for other, ids in asked.items() if other != name]


def _check_ids(ids: Any, V: int, file: Path) -> None:
    whole = isinstance(ids, list) and ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or not all(0 <= i < V for i in ids) or any(a == b for a, b in itertools.pairwise(sorted(ids))):
        shown = str(ids) if len(str(ids)) < 80 else f"{str(ids)[:80]}..."
        raise InputError(
            f"{FIELD} {shown} of {file.parent}", f"ids below {V} of the base's vocabulary, each once", MERGE
        )
