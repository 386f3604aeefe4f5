"""The model card of an export: base, data with counts and hashes, method, figures, configuration, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxalign import __version__
from jaxalign.config import defaults
from jaxalign.data.source import is_hub_id
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS
from jaxalign.train.metrics import read_metrics
from jaxalign.train.models import fit_length
from jaxalign.train.rundir import RunDir

_PACKAGES = ("jax", "flax", "optax", "transformers", "datasets")
# Figures that a card shows where the run has them, of training and of held-out data.
_FIGURES = (
    "loss", "loss/policy", "loss/value", "logps/completion", "rewards/accuracies", "rewards/margins", "rewards/chosen",
    "rewards/rejected", "objective/scores", "objective/kl", "objective/entropy",
)  # fmt: skip


def model_card(
    run: RunDir,
    config: Mapping[str, Any],
    step: int,
    inputs: Mapping[str, str] | None = None,
    note: str = "",
    base: str | None = None,
) -> str:
    """The text of an export's `README.md`, with front matter that the hub reads; the same run gives the same text.

    Args:
      run: the run's directory, with `data_report.json` and `metrics.jsonl`.
      config: of the run, as plain dicts.
      step: of the checkpoint that is exported.
      inputs: digests of what the run was made of, as its checkpoints keep them.
      note: a sentence on who loads the export, where it is not transformers.
      base: the model beside which the export is an adapter; None: it is a whole model.
    """
    name, start = config["algorithm"]["name"], config["model"]["path"]
    entry, sources = ALGORITHMS[name], _sources(config)
    front: dict[str, Any] = {"library_name": "jaxalign" if note else "peft" if base else "transformers"}
    if _on_hub(base or start):
        front["base_model"] = base or start
    if hub := [path for path in sources if _on_hub(path)]:
        front["datasets"] = hub
    front["pipeline_tag"] = "text-generation" if entry.head == "lm" else "text-classification"
    front["tags"] = ["jaxalign", name, *(["lora"] if base else []), *(config.get("logging", {}).get("tags") or ())]
    title = config.get("logging", {}).get("run_name") or os.path.basename(str(run.path).rstrip("/")) or name
    revision = f" at {config['model']['revision']}" if config["model"].get("revision") else ""
    scratch = " (its shape alone: the weights started at random)" if config["model"].get("from_scratch") else ""
    method = entry.method or name
    beside = f"An adapter of `{base}`: " if base else ""
    parts = [
        f"---\n{_yaml(front)}---",
        f"# {title}",
        f"{beside}`{start}`{revision}{scratch} after {step:,} steps of {method}, made with jaxalign {__version__}.",
        *([f"{note}."] if note else []),
        "## Data",
        _data(run, sources),
    ]
    if digests := [(what, value) for what, value in (inputs or {}).items() if "records" in what or "weights" in what]:
        parts.append(_table(("digest of", ""), ((what, f"`{value}`") for what, value in digests)))
    if figures := list(_figures(run, step)):
        parts += ["## Figures", _table(("figure", "value"), figures)]
    parts += ["## Configuration", "What differs from the defaults; `jaxalign train --config=FILE.yaml` reads it."]
    parts.append(f"```yaml\n{_yaml(changed(_as_given(config)))}```")
    if command := _command():
        parts.append(f"Command:\n\n```bash\n{command}\n```")
    versions = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    parts += ["## Versions", f"jaxalign {__version__}, Python {sys.version.split()[0]}, {versions}"]
    return without_secrets("\n\n".join(parts) + "\n")


def without_secrets(text: str) -> str:
    """A text whose URLs have lost what may be secret: user and password, and the query.

    >>> without_secrets("read `https://me:key@host/a.jsonl?sig=1&x=2`, gs://bucket/b")
    'read `https://host/a.jsonl`, gs://bucket/b'
    """
    text = re.sub(r"(\w+://)[^\s/@`'\"|]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?`'\"|]*)\?[^\s`'\"|]*", r"\1", text)


def _as_given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's configuration without a `data.max_length` that its models gave."""
    unset = dict(config) | {"data": dict(config["data"]) | {"max_length": None}}
    with contextlib.suppress(InputError):  # a model that is not there any more
        if fit_length(ConfigDict(unset))[0].data.max_length == config["data"]["max_length"]:
            return unset
    return config


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields that differ from the defaults, nested; the algorithm's name is always kept."""
    name = config["algorithm"]["name"]
    usual = defaults(name).to_dict()

    def differing(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            other = like.get(key)
            if isinstance(value, Mapping) and isinstance(other, Mapping):
                if inner := differing(value, other):
                    found[key] = inner
            elif (list(value) if isinstance(value, (tuple, list)) else value) != (
                list(other) if isinstance(other, (tuple, list)) else other
            ):
                found[key] = value
        return found

    different = differing(config, usual)
    return {"algorithm": {"name": name, **different.pop("algorithm", {})}, **different}


def _sources(config: Mapping[str, Any]) -> list[str]:
    given = config["data"]["sources"]
    given = [given] if isinstance(given, (str, Mapping)) else list(given)
    return [source["path"] if isinstance(source, Mapping) else str(source) for source in given]


def _on_hub(path: str) -> bool:
    return "/" in path and is_hub_id(path) and not os.path.exists(path)


def _data(run: RunDir, sources: list[str]) -> str:
    report = run.read_json("data_report.json") or {}
    records = report.get("records", {})
    rows = [
        (f"`{source.get('path')}`", f"{source.get('read', 0):,}", f"{source.get('used', 0):,}")
        for source in records.get("sources", [])
    ] or [(f"`{path}`", "", "") for path in sources]
    table = _table(("source", "records read", "in the mixture"), rows)
    counted = [f"{records.get('used', 0):,} records trained on"] if records else []
    counted += [f"{records['held_out']:,} held out"] if records.get("held_out") else []
    counted += [f"{n:,} left out ({why})" for why, n in (records.get("dropped") or {}).items() if n]
    return table + (f"\n\n{'; '.join(counted)}." if counted else "")


def _figures(run: RunDir, step: int) -> Iterator[tuple[str, str]]:
    row: dict[str, Any] = {}
    for one in read_metrics(run):
        if one["step"] == step:
            row |= one
    for name in _FIGURES:
        for figure in (name, f"eval/{name}"):
            if isinstance(row.get(figure), float):
                yield f"`{figure}`", f"{row[figure]:.4g}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yaml(tree: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _command() -> str:
    """The command of this process, where it is `jaxalign train`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    known = name == "jaxalign" or (name == "__main__.py" and "jaxalign" in sys.argv[0])
    return shlex.join(["jaxalign", *sys.argv[1:]]) if known and sys.argv[1:2] == ["train"] else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
