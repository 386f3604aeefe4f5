"""Configurations as text: read from YAML and JSON, written as Python, YAML and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config import defaults, get, leaves, stages, suit_adapter, to_dict
from jaxalign.errors import InputError
from jaxalign.pipeline.overrides import override
from jaxalign.registry import ALGORITHMS

FORMS = ("py", "yaml", "json")
SUFFIXES = (".yaml", ".yml", ".json")
# Placeholders in a new config file.
PLACEHOLDERS = {
    "model.path": "DIR_OR_HUB_ID",
    "data.sources": ("FILE.jsonl",),
    "rewards.function": "FILE.py:FUNCTION",
}


def read_config_text(file: Path) -> ConfigDict:
    """A YAML or JSON file as a configuration: the fields of `defaults(...)` that differ, nested or by dotted names.

    `algorithm` is a name, or a section with `name` and the algorithm's fields. With `stages`, a list of names, each has
    its section. The `config.json` of a run is read too.

    Raises:
      InputError: a file that cannot be parsed, names no algorithm, or sets a field that does not exist.
    """
    tree = _parse(file)
    if set(tree) == {"format", "config"} and isinstance(tree["config"], Mapping):  # the config.json of a run
        tree = tree["config"]
    if "stages" not in tree:
        return _stage(file, tree)
    names = tree["stages"]
    if not isinstance(names, list) or not all(isinstance(n, str) and isinstance(tree.get(n), Mapping) for n in names):
        raise InputError(
            f"{file}: stages is {names!r}"[:300], "a list of names, each with a section", f"edit {file}: stages: [sft]"
        )
    sections = {n: _stage(file, {"algorithm": n, **tree[n]} if n in ALGORITHMS else tree[n], f"{n}.") for n in names}
    config = stages(None, **sections)
    rest = {key: value for key, value in tree.items() if key not in ("stages", *names)}
    _set(file, config, rest)
    return config


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            tree = json.loads(text)
        else:
            import yaml

            tree = yaml.safe_load(text)
    except (ValueError, OSError, RecursionError) as error:
        raise _unreadable(file, error) from error
    except Exception as error:  # yaml's own
        raise _unreadable(file, error) from error
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{file} holds {type(tree).__name__}", "fields by their names", f"edit {file}: algorithm: dpo")
    return tree


def _unreadable(file: Path, error: Exception) -> InputError:
    form = "JSON" if file.suffix == ".json" else "YAML"
    return InputError(f"{file}: {' '.join(str(error).split())[:300]}", f"a file of {form}", f"edit {file}")


def _stage(file: Path, tree: Mapping[str, Any], prefix: str = "") -> ConfigDict:
    """One stage's configuration."""
    section = tree.get("algorithm", {})
    name = section if isinstance(section, str) else tree.get("algorithm.name")
    if isinstance(section, Mapping):
        name = section.get("name", name)
    if name not in ALGORITHMS:
        raise InputError(
            f"{file}: {prefix}algorithm is {name!r}" if name else f"{file} names no {prefix}algorithm",
            f"one of {', '.join(ALGORITHMS)}",
            f"edit {file}: algorithm: {{name: dpo}}",
        )
    c = defaults(name)
    given = {key: value for key, value in tree.items() if not (key == "algorithm" and isinstance(value, str))}
    _set(file, c, given)
    suit_adapter(c, set(_dotted(given)))
    return c


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names that a file sets."""
    for key, value in tree.items():
        yield from _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else (f"{prefix}{key}",)


def _set(file: Path, c: ConfigDict, tree: Mapping[str, Any], prefix: str = "") -> None:
    """Sets fields, nested or by dotted names."""
    for key, value in tree.items():
        field = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(get(c, field), ConfigDict):
            _set(file, c, value, f"{field}.")
            continue
        is_tuple = isinstance(get(c, field), tuple)
        try:
            override(c, field, repr([value]) if is_tuple and isinstance(value, (str, Mapping)) else _text(value))
        except InputError as error:
            fix = error.fix.replace("--config.", f"edit {file}: ", 1)
            raise InputError(error.found.replace("--config.", f"{file}: ", 1), error.expected, fix) from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def changed(config: ConfigDict) -> dict[str, Any]:
    """The fields of one stage that are not as `defaults` has them, by dotted name."""
    usual = defaults(config.algorithm.name)
    return {field: get(config, field) for field in leaves(usual) if get(config, field) != get(usual, field)}


def as_python(config: ConfigDict) -> str:
    """One stage's configuration as a Python config file.

    >>> c = defaults("dpo")
    >>> c.algorithm.beta = 0.2
    >>> print(as_python(c))
    from jaxalign.config import defaults
    <BLANKLINE>
    <BLANKLINE>
    def get_config():
        config = defaults("dpo")
        config.algorithm.beta = 0.2
        return config
    """
    fields = [
        (f'["from"]{name[4:]}' if name.startswith("from.") else f".{name}", v) for name, v in changed(config).items()
    ]
    lines = [f"    config{name} = {_python(value)}" for name, value in fields]
    head = ["from jaxalign.config import defaults", "", "", "def get_config():"]
    return "\n".join([*head, f'    config = defaults("{config.algorithm.name}")', *lines, "    return config"])


def _python(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_python, value))}{',' * (len(value) == 1)})"
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def written(config: ConfigDict, form: str) -> str:
    """One stage's configuration as a file's text.

    Args:
      config: of one stage.
      form: one of `FORMS`.
    """
    if form == "py":
        return as_python(config) + "\n"
    plain = to_dict(config)
    tree: dict[str, Any] = {"algorithm": {"name": config.algorithm.name}}
    for field in changed(config):
        *sections, leaf = field.split(".")
        node, here = tree, plain
        for section in sections:
            node, here = node.setdefault(section, {}), here[section]
        node[leaf] = here[leaf]
    if form == "json":
        return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
