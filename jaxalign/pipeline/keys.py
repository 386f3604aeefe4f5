"""The key of a stage: a hash of its configuration, the files it names, and the keys of its inputs."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxalign.config import get, to_dict
from jaxalign.errors import InputError
from jaxalign.functions import is_name, module_file
from jaxalign.ranges import ADDED, FUNCTIONS

FORMAT = 1

# Fields that say where or how to run: they do not change the result and are not part of the key.
_NOT_IN_KEY = (
    "workdir", "logging", "process_timeout", "profile", "mesh", "from", "model.remat", "data.cache_dir",
    "checkpoint.every", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.resume", "callbacks",
    "rollout.num_slots", "rollout.tensor",
)  # fmt: skip

# Fields that name files or directories; where these exist on this machine their contents are part of the key.
INPUTS = (
    "model.path", "model.tokenizer", "model.chat_template", "algorithm.reference_path", "algorithm.value_path",
    "rewards.model", "data.sources", "data.eval_sources",
)  # fmt: skip


_LENGTH = ("num_train_steps", "num_epochs")


class Keys(NamedTuple):
    """Hashes of a stage's configuration and inputs, 32 hex digits each."""

    key: str  # of its configuration, the files it names and its inputs' keys
    base: str  # `key` without the run's length
    unscored: str  # `key` without the file of the reward function
    files: dict[str, str | None]  # path -> digest of what is there


def keys_of(config: ConfigDict, inputs: Mapping[str, str], filled: tuple[str, ...]) -> Keys:
    """The keys of a stage, and what is in the files that it names.

    Args:
      config: of the stage, whole.
      inputs: role in `from` -> key of the stage that it names.
      filled: the fields that these inputs filled; their keys stand for them, wherever the workdir is.
    """
    tree = to_dict(config)
    for field in (*_NOT_IN_KEY, *(f for f, value in ADDED.items() if get(tree, f) == value)):
        *parents, leaf = field.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    tree = {name: value for name, value in tree.items() if value != {}}  # a section of later versions, left at defaults
    files: dict[str, str | None] = {}
    for field in INPUTS:
        if field in filled:
            section, leaf = field.split(".")
            tree[section].pop(leaf)
            continue
        for path in paths_in(get(config, field)):
            try:
                files[path] = file_digest(path)
            except OSError as error:
                words = f"{field}: {error.filename or path}: {error.strerror}"
                raise InputError(words, "files that can be read", f"--config.{field}=...") from error
    parts: dict[str, Any] = {"format": FORMAT, "inputs": dict(inputs), "files": dict(files)}
    unscored = _hash(parts | {"config": tree})
    if function := get(config, "rewards.function"):
        files[function] = parts["files"][function] = file_digest(module_file(function))
    for field in FUNCTIONS:
        if is_name(own := get(config, field)):
            files[own] = parts["files"][own] = file_digest(module_file(own))
    base = {name: value for name, value in tree.items() if name not in _LENGTH}
    return Keys(_hash(parts | {"config": tree}), _hash(parts | {"config": base}), unscored, files)


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def paths_in(value: Any) -> list[str]:
    """The paths in a field: a string, a dict with `path`, or a tuple of these."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (tuple, list)):
        return [path for item in value for path in paths_in(item)]
    return paths_in(value.get("path")) if hasattr(value, "get") else []


def file_digest(path: str) -> str | None:
    """The digest of a local file, of all files of a directory or a glob; None where there is none here.

    A file up to 64 MiB counts by its content; a larger one by size, time of change and first and last MiB.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):  # False also for what cannot be a path, such as the text of a template
        found = sorted(filter(os.path.exists, glob.glob(path))) if len(path) < 4096 and "://" not in path else []
        return hashlib.sha256(json.dumps([(p, file_digest(p)) for p in found]).encode()).hexdigest() if found else None
    root = Path(path)
    if root.is_dir():
        parts = [(p.relative_to(root).as_posix(), file_digest(str(p))) for p in sorted(root.rglob("*")) if p.is_file()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not root.is_file():
        return None
    size = root.stat().st_size
    with root.open("rb") as file:
        if size <= 64 << 20:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} {root.stat().st_mtime_ns}".encode() + file.read(1 << 20))
        file.seek(-(1 << 20), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()
