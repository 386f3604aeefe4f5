"""A source of records as a configuration gives it: its fields, checked, and the line that gives it."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxalign.data.files import supported
from jaxalign.data.preference import codes_of
from jaxalign.errors import InputError
from jaxalign.ranges import SOURCE_WEIGHT, misfit, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/\w[\w.-]*)?")
_FIELD = "data.sources"  # where sources stand in a configuration


class Source(NamedTuple):
    """One source of a mixture."""

    path: str  # file, glob, directory, URL or hub id
    split: str | None = None  # default: train, or the only one there is
    name: str | None = None  # subset of a hub set
    revision: str | None = None  # of a hub set
    weight: float = 1.0  # how often each record is drawn
    columns: dict[str, Any] = {}  # noqa: RUF012  our name -> the data's name, or a dict of it and its codes
    preset: str | None = None
    streaming: bool = False  # read a hub set while it is downloaded, only as far as needed
    field: str = ""  # the config field it was given in, for messages; "" without a configuration


def parse_sources(sources: Any, field: str = "") -> list[Source]:
    """The sources of a config field, checked.

    Args:
      sources: a path, a dict with the fields of `Source`, or a sequence of these.
      field: the config field, for messages; where it is given, they name its flag too.

    >>> parse_sources(("a.jsonl", {"path": "b.jsonl", "weight": 2}))[1].weight
    2.0
    """
    name, line = field or _FIELD, config_line(Source("data.jsonl", field=field))
    if isinstance(sources, (str, os.PathLike)) or _is_dict(sources):
        sources = (sources,)
    if not isinstance(sources, Iterable):
        raise InputError(f"{name} is {sources!r}", "paths, hub ids or dicts", line)
    parsed = [_parse(item, field) for item in sources]
    if not parsed:
        raise InputError(f"{name} is empty", "at least one source", line)
    return parsed


def _is_dict(item: Any) -> bool:
    return isinstance(item, Mapping) or (
        hasattr(item, "to_dict") and hasattr(item, "keys")
    )  # a ConfigDict is no Mapping


def _parse(item: Any, field: str) -> Source:
    if isinstance(item, (str, os.PathLike)):
        item = {"path": os.fspath(item)}
    if not _is_dict(item):
        raise InputError(
            f"{field or _FIELD} holds {item!r}",
            "a path, a hub id or a dict with a path",
            config_line(Source("data.jsonl", field=field)),
        )
    item = dict(item.items())
    if isinstance(item.get("path"), os.PathLike):
        item["path"] = os.fspath(item["path"])
    known = [name for name in Source._fields if name != "field"]
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            right = {near if k == key else k: v for k, v in item.items() if k != key or near not in item}
            raise InputError(f"a source with {key!r}", f"one of {', '.join(known)}", _line(field, right))
    for key in ("path", "split", "name", "revision", "preset"):
        value = item.get(key)
        if (key == "path" or value is not None) and not (isinstance(value, str) and value.strip()):
            right = {"path": "data.jsonl"} | {k: v for k, v in item.items() if k != key}
            raise InputError(f"a source whose {key} is {value!r}", "a string", _line(field, right))
    if not isinstance(streaming := item.get("streaming", False), bool):
        right = item | {"streaming": str(streaming).lower() in ("true", "1", "yes")}
        raise InputError(f"{item['path']}: streaming {streaming!r}", "true or false", _line(field, right))
    source = Source(item["path"], item.get("split"), item.get("name"), item.get("revision"), field=field)
    weight = item.get("weight", 1.0)
    if expected := misfit(weight, *SOURCE_WEIGHT):
        raise InputError(
            f"{source.path}: weight {shown(weight)}",
            f"{expected}: 1 draws each record once, 2 twice, 0.5 every other",
            _line(field, _weighed(item)),
        )
    columns = _columns(source, item.get("columns") or {})
    return source._replace(
        weight=float(weight), columns=columns, preset=item.get("preset"), streaming=item.get("streaming", False)
    )


def _weighed(item: Mapping[str, Any]) -> dict[str, Any]:
    """A source with the number that its weight spells, or without a weight."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        weight = float(item["weight"])
        if not misfit(weight, *SOURCE_WEIGHT):
            return {**item, "weight": int(weight) if weight == int(weight) else weight}
    return {name: value for name, value in item.items() if name != "weight"}


def _columns(source: Source, columns: Any) -> dict[str, Any]:
    """A source's mapping, as plain dicts."""
    plain: dict[str, Any] = {}
    for ours, theirs in columns.items() if _is_dict(columns) else ((None, None),):
        if ours == "preference" and _is_dict(theirs):
            plain[ours] = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in theirs.items()}
            try:
                codes_of(plain[ours])
            except ValueError as error:
                right = {"column": "label", "first": 1, "second": 2, "tie": 0}
                raise InputError(
                    f"{source.path}: columns maps preference to {plain[ours]!r}: {error}",
                    "a column, and which of its codes mean the first answer, the second, or a tie",
                    config_line(source, columns={"prompt": "q", "chosen": "a", "rejected": "b", "preference": right}),
                ) from None
        elif isinstance(ours, str) and isinstance(theirs, str):
            plain[ours] = theirs
        else:
            raise InputError(
                f"{source.path}: columns {columns!r}",
                "a dict of our name to the data's name",
                config_line(source, columns={"prompt": "question", "completion": "answer"}),
            )
    return plain


def config_line(source: Source, **changes: Any) -> str:
    """The config line of a changed source, for messages; with the flag if it was given in a config field.

    >>> config_line(Source("x.jsonl"), columns={"prompt": "q"})
    'data.sources=({"path": "x.jsonl", "columns": {"prompt": "q"}},)'
    >>> print(config_line(Source("no.jsonl", field="data.sources"), path="x y.jsonl"))
    data.sources=({"path": "x y.jsonl"},) (as a flag: --config.data.sources='x y.jsonl')
    """
    shown = {
        name: value
        for name, value in source._replace(**changes)._asdict().items()
        if name != "field" and (name == "path" or value != Source._field_defaults[name])
    }
    return _line(source.field, shown)


def _line(field: str, item: Mapping[str, Any]) -> str:
    """The config line that gives a source, with the flag if it was given in a config field."""
    text = json.dumps(item, ensure_ascii=False, default=lambda value: dict(value) if _is_dict(value) else str(value))
    python = text.replace(": true", ": True").replace(": false", ": False").replace(": null", ": None")
    line = f"{field or _FIELD}=({python},)"
    if not field:
        return line
    plain = set(item) == {"path"} and not set(item["path"]) & set(",([{'\"")
    value = shlex.quote(item["path"] if plain else f"[{text}]")
    return f"{line} (as a flag: --config.{field}={value})"


def is_hub_id(path: str) -> bool:
    """Whether a path that is not here may be a data set's or a model's id on the hub: `owner/name` or `name`.

    >>> is_hub_id("owner/name"), is_hub_id("pairs.jsonl"), is_hub_id("./pairs"), is_hub_id("runs/reward/export")
    (True, False, False, False)
    """
    return _HUB_ID.fullmatch(path) is not None and not supported(path)
