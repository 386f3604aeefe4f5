"""From a model as a user names it (directory, URL, hub id) to a local directory."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from pathlib import Path
from typing import Any

from jaxalign.data.files import is_url
from jaxalign.data.source import is_hub_id
from jaxalign.errors import InputError
from jaxalign.models import store
from jaxalign.models.store import ADAPTER_CONFIG as ADAPTER_CONFIG
from jaxalign.models.store import CONFIG as CONFIG
from jaxalign.models.store import DESCRIPTIONS as DESCRIPTIONS

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is there, whatever else
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def locate(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory that holds a model; a hub id is fetched into the hub's cache, or found there when offline.

    Args:
      path: a directory, a URL that fsspec knows such as "gs://bucket/model", or a hub id such as "org/name".
      revision: branch, tag or commit of a hub id.
      weights: whether safetensors are wanted too.

    Raises:
      InputError: no such directory, and not on the hub or not reachable.
    """
    patterns = [*DESCRIPTIONS, GENERATION_CONFIG, *TOKENIZER_FILES, *LICENCE_FILES]
    if weights:
        patterns += ["*.safetensors", "*.safetensors.index.json"]
    if is_url(os.fspath(path)):
        return store.fetch(os.fspath(path), lambda name: any(fnmatch.fnmatchcase(name, p) for p in patterns))
    directory = Path(path).expanduser()
    if directory.is_dir():
        _check_links(directory, patterns)
        _check_run(directory, path)
        return directory.resolve()
    if not is_hub_id(os.fspath(path)) or directory.exists():
        made = directory.name == "export"  # as a run writes it
        raise InputError(
            f"no directory {path}",
            "a directory in Hugging Face form, or a hub id",
            f"--config.model.path={_near(path)}" + (", or run the stage that writes it first" if made else ""),
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        found = snapshot_download(
            str(path), revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}{at}: no such directory here, and the hub did not give it ({reason})",
            "a directory in Hugging Face form, or a hub id that is in the cache or can be reached",
            f"hf download {path}, or HF_TOKEN=... for a gated model, or --config.model.path={_near(path)}",
        ) from error
    return Path(found)


def is_adapter_dir(directory: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's form, which names the model that it belongs to."""
    return (directory / ADAPTER_CONFIG).is_file()


def base_of(directory: Path, *, weights: bool = True) -> Path:
    """The directory of the model that an adapter was trained on, as its `adapter_config.json` names it.

    Args:
      directory: of the adapter.
      weights: as `locate` takes it.

    Raises:
      InputError: no model there, or an adapter in its place.
    """
    file = directory / ADAPTER_CONFIG
    told = read_json(file)
    name, revision = told.get("base_model_name_or_path"), told.get("revision")
    fix = f'"base_model_name_or_path": "DIR" in {file}'
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        found = f"base_model_name_or_path {name!r} at revision {revision!r} in {file}"
        raise InputError(found, "the model that the adapter was trained on: a directory or a hub id", fix)
    try:
        base = locate(name, revision, weights=weights)
    except InputError as error:
        raise InputError(
            f"{directory} is an adapter of {name}: {error.found}",
            "that model: a directory, from where the command runs, or a hub id",
            f"{fix}, or put the model there",
        ) from error
    if is_adapter_dir(base):
        raise InputError(
            f"{directory} is an adapter of {name}, which is an adapter itself",
            "an adapter of a whole model",
            f"{fix}, DIR with the first adapter merged: jaxalign.save(DIR, *jaxalign.load({str(base)!r}))",
        )
    return base


def file_of(directory: Path, name: str) -> Path:
    """A file of a model by its name; of an adapter its own where it has one, else its base's."""
    own = directory / name
    return own if own.exists() or not is_adapter_dir(directory) else base_of(directory, weights=False) / name


def tokenizer_home(directory: Path) -> Path:
    """Where a model's tokenizer is; an adapter without one of its own has its base's."""
    whole = any((directory / name).exists() for name in _TOKENIZERS)
    return directory if whole or not is_adapter_dir(directory) else base_of(directory, weights=False)


def _near(path: str | Path) -> str:
    """The model beside a path that is not there whose name is most like its own; DIR where there is none."""
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    models = [file.parent.name for kind in DESCRIPTIONS for file in Path(folder).expanduser().glob(f"*/{kind}")]
    near = difflib.get_close_matches(name, models, n=1)
    return os.path.join(folder, near[0]) if near else "DIR"


def _check_run(directory: Path, path: str | Path) -> None:
    """Refuses the directory of a run, or of a run with stages: the model is a folder in it."""
    config = directory / CONFIG
    if config.is_file():
        try:
            held = json.loads(config.read_text())
        except (ValueError, RecursionError, OSError):
            return  # whoever reads it says what is wrong with it
        if not isinstance(held, dict) or not {"format", "config"} <= held.keys() or "model_type" in held:
            return
    there = [e / kind for e in (directory / "export", *sorted(directory.glob("*/export"))) for kind in DESCRIPTIONS]
    there = [file for file in there if file.is_file() and ".old-" not in file.parent.parent.name]
    exports = [file.parent for file in sorted(there, key=lambda file: file.stat().st_mtime)]  # the last stage last
    if exports:
        shown = [os.path.join(path, e.relative_to(directory)) for e in exports]
        raise InputError(
            f"{path} is a run's directory", f"the model in it: {' or '.join(shown)}", f"--config.model.path={shown[-1]}"
        )
    if config.is_file():
        raise InputError(
            f"{path} is a run's directory, and the run has not exported its model yet",
            f"{os.path.join(path, 'export')}, which it writes at its end",
            f"run it to its end, or jaxalign export --workdir {path} --out DIR and --config.model.path=DIR",
        )


def _check_links(directory: Path, patterns: list[str]) -> None:
    """Refuses links to nothing among a model's files: one that is passed over would be another model."""
    for name in sorted(os.listdir(directory)):
        file = directory / name
        if file.is_symlink() and not file.exists() and any(fnmatch.fnmatchcase(name, p) for p in patterns):
            raise InputError(
                f"{file} is a link to {os.readlink(file)}, and there is nothing",
                "a file, or a link to one",
                "copy the model whole (cp -rL), or hf download it again: --config.model.path=DIR",
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: no such file, or not a JSON object.
    """
    if not file.is_file():
        raise InputError(f"no {file.name} in {file.parent}", "a model in Hugging Face form", "--config.model.path=DIR")
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}", "a JSON object", f"a whole {file.name}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", "a readable file", f"chmod u+r {file}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}", "a JSON object", f"a whole {file.name}")
    return value
