"""`jaxalign config`: each field's default, allowed values and description, read from the code's comments."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from jaxalign import config as configuration
from jaxalign import registry
from jaxalign.config import defaults, get, leaves
from jaxalign.ranges import BOUNDS, CHOICES, REQUIRED
from jaxalign.registry import ALGORITHMS


class Field(NamedTuple):
    """A field for a reader."""

    name: str  # dotted
    default: object
    allowed: str  # "" where the type says it all
    sentence: str  # "" where the name says it all


def fields(algorithm: str) -> list[Field]:
    """The fields of an algorithm, in the order of its tree.

    >>> next(f for f in fields("dpo") if f.name == "optimizer.max_grad_norm").sentence
    'gradients are clipped to this norm, by role; 0: no clipping'
    """
    tree, found = defaults(algorithm), []
    for name in leaves(tree):
        comment = _comment(name, algorithm)
        found.append(Field(name, get(tree, name), _allowed(name, comment), comment))
    return found


def page(algorithm: str, width: int = 120) -> str:
    """The fields with their defaults and sentences, for a terminal."""
    lines = [f"Fields of {algorithm}, with their defaults. On the command line: --FIELD=VALUE."]
    section = ""
    for field in fields(algorithm):
        own = field.name.rpartition(".")[0]
        if own != section or len(lines) == 1:
            lines += [""]
            section = own
        head = f"{field.name} = {_shown(field)}"
        words = "; ".join(filter(None, (field.sentence, field.allowed)))
        wrapped = textwrap.wrap(words, width - 46) or [""]
        lines.append(f"{head:<45} {wrapped[0]}".rstrip())
        lines += [f"{'':<45} {more}" for more in wrapped[1:]]
    return "\n".join(lines)


def _shown(field: Field) -> str:
    return "required" if field.name in REQUIRED else repr(field.default)


def _allowed(name: str, comment: str) -> str:
    """The values that a field may hold, where its comment does not say them."""
    choices = [str(value) for value in dict(CHOICES).get(name, ()) if value is not None]
    if choices:
        return "" if all(value in comment for value in choices) else f"one of {', '.join(choices)}"
    for field, low, high in BOUNDS:
        if field == name:
            if high <= 1000:
                return f"{low:g} to {high:g}"
            return "above 0" if 0 < low < 1e-6 else f"at least {low:g}" if low > 1 else ""
    return ""


def _comment(name: str, algorithm: str) -> str:
    """The comment beside a field: where its whole name is written, the algorithm's own before the common one."""
    others = {f"_{other}" for other in ALGORITHMS} - {f"_{algorithm}"}
    section, _, leaf = name.rpartition(".")
    told = {(path, scope): text for path, scope, text in _comments() if path in (name, leaf) and scope not in others}
    wanted = [(name, f"_{algorithm}"), (name, "_common"), (leaf, f"_{section}")]
    loose = [(path, scope) for path, scope in told if path == leaf and scope not in ("_common", f"_{algorithm}")]
    return next((told[place] for place in [*wanted, *loose] if place in told), "")


@functools.cache
def _comments() -> tuple[tuple[str, str, str], ...]:
    """(name as far as it is written there, function, comment) of each field that has a comment where its default is."""
    return tuple(told for module in (configuration, registry) for told in _comments_of(inspect.getsource(module)))


def _comments_of(source: str) -> list[tuple[str, str, str]]:
    beside: dict[int, str] = {}  # line: comment behind code
    above: dict[int, str] = {}  # line: comment on a line of its own
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else beside)[token.start[0]] = token.string.lstrip("# ").strip()
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            written = list(_written(function))
            for path, line in written:
                text = beside.get(line, "") or _before(above, line)
                # Of several fields in a line a comment may name the one that it is about.
                first, _, rest = text.partition(": ")
                named = [p for p, other in written if other == line and p.endswith(f".{first}")]
                if text and (not named or path in named):
                    found.append((path, function.name, rest if named else text))
    return found


def _before(above: dict[int, str], line: int) -> str:
    lines = []
    while (line := line - 1) in above:
        lines.insert(0, above[line])
    return " ".join(lines)


def _written(function: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each key of a dict and each `c.name = ...` in a function."""

    def inside(node: ast.Dict, prefix: str) -> Iterator[tuple[str, int]]:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield f"{prefix}{key.value}", key.lineno
                if isinstance(value, ast.Dict):
                    yield from inside(value, f"{prefix}{key.value}.")

    nested: set[ast.Dict] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Dict) and node not in nested:
            nested |= {n for n in ast.walk(node) if isinstance(n, ast.Dict)}
            yield from inside(node, "")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield ast.unparse(node.targets[0]).partition(".")[2], node.lineno
