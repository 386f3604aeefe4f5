"""Which parameters `model.train` names: patterns of names, layers and tokens, in Hugging Face's words or ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.config import ModelConfig
from jaxalign.models.stacks import Cuts, changes
from jaxalign.models.token_rows import ENDS, TokenRows
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path

# Beyond a model's own: a pattern that names one of these numbers and not all numbers names layers that are not there.
_BEYOND = 1000
_ANY = 987_654_321
_LAYERS = re.compile(r"layers\[(-?\d+|(?:-?\d+)?:(?:-?\d+)?)\]")
_ROWS = re.compile(r"(.*[A-Za-z_)])\[([^][]*)\]")  # of a table: its name, and which tokens
_IDS = re.compile(r"(-?\d+)|(-?\d+)?:(-?\d+)?(?::(-?\d+))?")
ADDED = "added"  # among them: the tokens of `model.add_tokens`
_PARTS = re.compile(r"(\[[^]]*\]|\{[^}]*\}|\\.)|(\d+)(?![\d\\[{+*?])")

Names = tuple[str, ...]  # of one parameter, of one layer


def expression(pattern: str, num_layers: int) -> re.Pattern:
    """A regular expression of whole names of a path, of Hugging Face's names or ours.

    `layers[-2:]` stands for the last two layers, as Python counts; a number is a whole one: `layers.1.*` is not layer
    10.

    Args:
      pattern: as `model.train` has them.
      num_layers: L.

    Raises:
      re.error: it is no regular expression.

    >>> found = expression("layers[-2:].mlp", 12)
    >>> [bool(found.search(f"model.layers.{i}.mlp.up_proj.weight")) for i in (1, 9, 10, 11)]
    [False, False, True, True]
    >>> bool(expression("layers.1.*", 12).search("model.layers.10.mlp.up_proj.weight"))
    False
    """

    def numbers(match: re.Match) -> str:
        there = "|".join(map(str, sorted(_sliced(match[1], num_layers)[0])))
        return f"layers[./](?:{there})" if there else "layers(?!)"

    plain = _LAYERS.sub(numbers, pattern)
    re.compile(plain)  # by itself, so that what stands around it closes nothing that it leaves open
    whole = _PARTS.sub(lambda m: m[1] or rf"{m[2]}(?!\d)", plain)
    return re.compile(rf"(?:^|[./])(?:{whole})(?:[./]|$)")


def _sliced(text: str, num_layers: int) -> tuple[list[int], bool]:
    """The layers that the text between brackets names, and whether the model has all of them."""
    first, colon, last = text.partition(":")
    start, stop = (int(bound) if bound else None for bound in (first, last))
    own = range(num_layers)
    if not colon:
        assert start is not None
        within = -num_layers <= start < num_layers
        return ([own[start]] if within else []), within
    ends = [bound for bound in (start, stop) if bound is not None]
    return list(own[start:stop]), all(-num_layers <= end <= num_layers for end in ends)


def names_of(config: ModelConfig) -> dict[str, list[Names]]:
    """The names of each parameter of the whole model, of each layer: Hugging Face's, ours, ours with the number.

    What is no layer's has one entry.
    """
    rows = {row.path: row for row in config.family.names.rows}
    found = {}
    for path in by_path(Model(config).plain().abstract()):
        if rows[path].stacked:
            found[path] = [_of_layer(rows[path], path, i) for i in range(config.num_layers)]
        else:
            found[path] = [(rows[path].name, path)]
    return found


def _of_layer(row: Any, path: str, layer: int) -> Names:
    return row.named((layer, 0)), path, path.replace("layers/", f"layers/{layer}/", 1)


def matched(config: ModelConfig, patterns: Sequence[str]) -> dict[str, list[bool]]:
    """Whether each parameter is named, by path and layer; a pattern that names nothing, or is none, is left out.

    So is one that names some tokens' vectors, see `token_rows_of`.
    """
    expressions = []
    for pattern in patterns:
        if _tables(config, pattern):
            continue
        try:
            expressions.append(expression(pattern, config.num_layers))
        except re.error:
            continue
    return {
        path: [any(one.search(name) for one in expressions for name in names) for names in layers]
        for path, layers in names_of(config).items()
    }


def cuts_of(config: ModelConfig, patterns: Sequence[str]) -> Cuts:
    """Where the layers of a model are cut, so that each stack is trained alike.

    Args:
      config: of the model.
      patterns: as `model.train` has them.
    """
    if not patterns:
        return None
    return changes(found for path, found in matched(config, patterns).items() if path.startswith("layers/"))


def of_head(config: ModelConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns without those that name what a model with another head has alone."""
    other = dataclasses.replace(config, head={"lm": "score", "score": "lm"}[config.head])
    names = lambda of, pattern: bool(_tables(of, pattern)) or any(map(any, matched(of, [pattern]).values()))  # noqa: E731
    return tuple(pattern for pattern in patterns if names(config, pattern) or not names(other, pattern))


def with_added(patterns: Iterable[str], ids: Sequence[int]) -> tuple[str, ...]:
    """Patterns with the ids of added tokens in place of their word.

    >>> with_added(["embed[added]", "lm_head[2, added]", "norm"], [7, 9])
    ('embed[7,9]', 'lm_head[2,7,9]', 'norm')
    """
    own = ",".join(map(str, ids))

    def one(pattern: str) -> str:
        match = _ROWS.fullmatch(pattern)
        if match is None or ADDED not in (items := _items(match[2])):
            return pattern
        return f"{match[1]}[{','.join(own if item == ADDED else item for item in items)}]"

    return tuple(map(one, patterns))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _tables(config: ModelConfig, pattern: str) -> list[str]:
    """The tables of which a pattern names some tokens' vectors; none where it names whole parameters."""
    match = _ROWS.fullmatch(pattern)
    if match is None or not all(_IDS.fullmatch(item) for item in _items(match[2])):
        return []
    try:
        own = expression(match[1], config.num_layers)
    except re.error:
        return []
    found = [p for p, layers in names_of(config).items() for each in layers for name in each if own.search(name)]
    return [table for table in ENDS if table in found and set(found) <= {*ENDS, "embed/positions"}]


def token_rows_of(config: ModelConfig, patterns: Sequence[str]) -> TokenRows | None:
    """Of which tokens the vectors are trained, and not their table: `embed[128256:]`, `lm_head[5,7:9]`; None: of none.

    Args:
      config: of the model, with the tokens that were added.
      patterns: as `model.train` has them, without the word for added tokens.

    Raises:
      InputError: ids that the vocabulary has not.
    """
    found: dict[str, list[int]] = {}
    for pattern in patterns:
        for table in _tables(config, pattern):
            match = _ROWS.fullmatch(pattern)
            assert match is not None
            for item in _items(match[2]):
                found.setdefault(table, []).extend(_ids(pattern, item, config.vocab_size))
    return TokenRows.of(found)


def _ids(pattern: str, item: str, V: int) -> Sequence[int]:
    """Those that an id or a slice stands for, as Python counts."""
    match = _IDS.fullmatch(item)
    assert match is not None
    if match[1]:
        bounds, ids = [int(match[1])], range(V)[int(match[1]) :][:1] if int(match[1]) < V else range(0)
        within = -V <= bounds[0] < V
    else:
        start, stop, step = (int(bound) if bound else None for bound in match.groups()[1:])
        within = all(-V <= end <= V for end in (start, stop) if end is not None) and step != 0
        ids = range(V)[start:stop:step] if within else range(0)
    if not within or not ids:
        there = "which holds no id" if within else "which goes beyond them"
        raise InputError(
            f"model.train {pattern!r} names {item} of {V} ids, {there}",
            f"ids 0 to {V - 1}, and slices of them: {V - 2}:",
            f"--config.model.train={pattern[: pattern.index('[')]}[{V - 2}:]",
        )
    return ids


def check(config: ModelConfig, pattern: str) -> None:
    """Refuses a pattern that is no regular expression, that names nothing, or that names layers which are not there.

    Args:
      config: of the model.
      pattern: as `model.train` has them.

    Raises:
      InputError: with the nearest names.
    """
    L = config.num_layers
    try:
        own = expression(pattern, L)
    except re.error as error:
        expected = "a regular expression of a parameter's path"
        raise InputError(f"model.train {pattern!r}: {error}", expected, "--config.model.train=lm_head") from error
    counted = f"layers 0 to {L - 1}: layers.{L - 1}, layers[{-min(2, L)}:]"
    for match in _LAYERS.finditer(pattern):
        layers, within = _sliced(match[1], L)
        if not within or not layers:
            there = "which holds no layer" if within else "which goes beyond them"
            raise InputError(
                f"model.train {pattern!r} names {match[0]} of {L} layers, {there}",
                counted,
                f"--config.model.train='layers[{-min(2, L)}:]'",
            )
    if _tables(config, pattern):
        return
    names = names_of(config)
    if beyond := _beyond(config, own, names):
        raise InputError(
            f"model.train {pattern!r} names layer {beyond} of a model of {L} layers",
            counted,
            f"--config.model.train=layers.{L - 1}",
        )
    if not any(own.search(name) for layers in names.values() for each in layers for name in each):
        if (match := _ROWS.fullmatch(pattern)) and all(_IDS.fullmatch(item) for item in _items(match[2])):
            tables = [path.partition("/")[0] for path in ENDS if path in names]
            raise InputError(
                f"model.train {pattern!r} names rows of {match[1]}, which has no vectors of tokens",
                f"rows of {' or '.join(tables)}" + ", which is the head too" * (config.tied and config.head == "lm"),
                f"--config.model.train={tables[0]}[{match[2]}]",
            )
        if config.tied and config.head == "lm" and re.match(r"(model\.)?lm_head\b", pattern):
            raise InputError(
                f"model.train {pattern!r} of a model whose head is its embedding",
                "embed, which is both",
                "--config.model.train=embed",
            )
        paths, modules = list(names), [each[0] for layers in names.values() for each in layers]
        near = get_close_matches(pattern, modules if re.search(r"\d", pattern) else paths, n=1, cutoff=0.0)[0]
        raise InputError(
            f"model.train {pattern!r} matches no parameter",
            f"whole names of a path such as {', '.join(paths[:4])}, or Hugging Face's, {modules[0]}",
            f"--config.model.train={near}",
        )


def _beyond(config: ModelConfig, own: re.Pattern, names: Mapping[str, Any]) -> int | None:
    """The first layer that an expression names and the model lacks."""
    for row in config.family.names.rows:
        if row.path in names and row.stacked:
            if any(own.search(name) for name in _of_layer(row, row.path, _ANY)):
                continue
            for layer in range(config.num_layers, config.num_layers + _BEYOND):
                if any(own.search(name) for name in _of_layer(row, row.path, layer)):
                    return layer
    return None
