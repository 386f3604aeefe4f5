"""Two-way tables between Hugging Face tensor names and the parameter tree; one row serves loading and saving."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxalign.models.config import ModelConfig

Index = tuple[int, ...]  # within a stacked parameter: (), (layer,) or (layer, expert)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its Hugging Face name, its path in the parameter tree, and how its dims move.

    `dims` reads "theirs -> ours": letters of DESIGN's dims, parentheses for dims that Hugging Face holds merged.
    In a name "{layer}" and "{expert}" stand for numbers; our parameters are stacked along them, in this order.
    Rows that follow each other under one name are parts of one fused tensor, which lie along its dim `along`. Where
    they alternate, such as by head, it has more dims, of which the file holds the first `merged` as one.
    """

    name: str
    path: str
    dims: str
    along: int = 0
    merged: int = 1

    @property
    def stacked(self) -> int:
        """How many leading dims of the parameter the name's numbers count."""
        return self.name.count("{")

    def named(self, index: Index) -> str:
        """The name of the tensor that holds one index of the parameter."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        return re.compile(re.sub(r"\\{(layer|expert)\\}", r"(?P<\1>0|[1-9]\\d*)", re.escape(self.name)))

    def _plan(self) -> tuple[list[str], str, str]:
        theirs, ours = (side.strip() for side in self.dims.split("->"))
        groups = [a or b for a, b in re.findall(r"\((\w+)\)|(\w)", theirs)]
        return groups, "".join(groups), ours

    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """The dims of a kernel's inputs, then of its outputs, each as they are written on their side and on ours.

        >>> Row("q_proj.weight", "query/kernel", "(NH)D -> DNH").sides()  # as torch's Linear has them, outputs first
        (('D', 'D'), ('(NH)', 'NH'))
        >>> Row("c_fc.weight", "up/kernel", "DF -> DF").sides()  # as Conv1D has them
        (('D', 'D'), ('F', 'F'))
        """
        groups, flat, ours = self._plan()
        first, second = groups[: self.merged], groups[self.merged :]
        cut = len("".join(second))
        inputs, outputs = second, first
        if set(ours[:cut]) != set("".join(second)):
            cut, inputs, outputs = len(flat) - cut, first, second
        theirs = ["".join(f"({group})" if len(group) > 1 else group for group in side) for side in (inputs, outputs)]
        return (theirs[0], ours[:cut]), (theirs[1], ours[cut:])

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the tensor in the file, or of this part of it."""
        return tuple(math.prod(sizes[d] for d in group) for group in self._plan()[0])

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One layer's array in our layout, as a view: nothing is read until it is indexed."""
        _, flat, ours = self._plan()
        return tensor.reshape([sizes[d] for d in flat]).transpose([flat.index(d) for d in ours])

    def to_theirs(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse of `to_ours`, contiguous."""
        _, flat, ours = self._plan()
        return np.ascontiguousarray(array.transpose([ours.index(d) for d in flat])).reshape(self.shape(sizes))


class Fused(NamedTuple):
    """The rows of one tensor, mostly one; several are parts that are concatenated."""

    rows: tuple[Row, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the tensor in the file."""
        apart, merged = self._apart(sizes), self.rows[0].merged
        return (math.prod(apart[:merged]), *apart[merged:])

    def _apart(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape before its first dims are merged."""
        shapes = [row.shape(sizes) for row in self.rows]
        along = self.rows[0].along
        return tuple(sum(s[d] for s in shapes) if d == along else n for d, n in enumerate(shapes[0]))

    def whole(self, parts: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """The tensor of its parts, one of each row."""
        together = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.rows[0].along)
        return together.reshape(self.shape(sizes))

    def part(self, row: Row, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The part of a tensor that a row names, as a view."""
        if len(self.rows) == 1:
            return tensor
        tensor = tensor.reshape(self._apart(sizes))
        before = sum(r.shape(sizes)[row.along] for r in itertools.takewhile(lambda r: r != row, self.rows))
        return tensor[(slice(None),) * row.along + (slice(before, before + row.shape(sizes)[row.along]),)]


class Names:
    """A family's table of tensor names."""

    def __init__(self, *rows: Row, harmless: tuple[str, ...] = (), other: tuple[tuple[str, str], ...] = ()):
        """Args:
        rows: in the order of a checkpoint: what comes before the layers first.
        harmless: patterns of keys that hold nothing trained.
        other: names under which files hold the same tensors: patterns of the whole name, and the table's own.
        """
        self.rows, self._other = rows, other
        self._harmless = tuple(re.compile(pattern) for pattern in harmless)
        self._by_path = {row.path: row for row in rows}
        self._fused = {name: Fused(tuple(group)) for name, group in itertools.groupby(rows, lambda row: row.name)}
        if len(self._by_path) < len(rows) or sum(len(f.rows) for f in self._fused.values()) < len(rows):
            raise ValueError("two rows of one path, or parts of a tensor that do not follow each other")

    def with_rows(self, *rows: Row, after: str, without: tuple[str, ...] = ()) -> Names:
        """The same table with more rows, which stand behind that of the path `after`.

        Rows of the same paths go, and those of the paths `without`.
        """
        at, gone = self.rows.index(self.row_of(after)) + 1, {*without, *(row.path for row in rows)}
        first, last = ([r for r in part if r.path not in gone] for part in (self.rows[:at], self.rows[at:]))
        return Names(*first, *rows, *last, harmless=tuple(p.pattern for p in self._harmless), other=self._other)

    def row_of(self, path: str) -> Row:
        """The row of a parameter's path.

        Raises:
          KeyError: the table has none.
        """
        if path not in self._by_path:
            raise KeyError(f"no Hugging Face name for the parameter {path}: add a row to the family's table")
        return self._by_path[path]

    def fused_of(self, row: Row) -> Fused:
        """The tensor that a row is, or is a part of."""
        return self._fused[row.name]

    def find(self, name: str) -> tuple[Fused, Index] | None:
        """The rows and the index of a Hugging Face name, or None where the table does not know it.

        >>> names = Names(Row("h.{layer}.up.weight", "layers/mlp/up/kernel", "FD -> DF"))
        >>> fused, index = names.find("h.3.up.weight")
        >>> fused.rows[0].path, index
        ('layers/mlp/up/kernel', (3,))
        """
        for fused in self._fused.values():
            row = fused.rows[0]
            if match := row.pattern.fullmatch(name):
                return fused, tuple(int(match[n]) for n in ("layer", "expert")[: row.stacked])
        return None

    def own(self, name: str) -> str:
        """The table's name of a tensor that a file may hold under another."""
        for pattern, known in self._other:
            if match := re.fullmatch(pattern, name):
                return match.expand(known)
        return name

    def has_another(self, name: str) -> bool:
        """Whether a tensor of the table is known by another name too."""
        return any(known == name for _, known in self._other)

    def is_harmless(self, name: str) -> bool:
        """Whether a key of an old file may be left unread."""
        return any(pattern.fullmatch(name) for pattern in self._harmless)

    def in_order(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Fused, Index]]:
        """Every tensor of a checkpoint, layer by layer, in the order of the table.

        Args:
          shapes: of the parameters by path; those that the table has and these lack are left out.
        """
        there = [fused for fused in self._fused.values() if fused.rows[0].path in shapes]
        for stacked, group in itertools.groupby(there, lambda fused: fused.rows[0].stacked > 0):
            tensors = list(group)
            for layer in range(shapes[tensors[0].rows[0].path][0] if stacked else 1):
                for fused in tensors:
                    experts = shapes[fused.rows[0].path][1:2] if fused.rows[0].stacked > 1 else (1,)
                    for expert in range(experts[0]):
                        yield fused, (layer, expert)[: fused.rows[0].stacked]


def sizes(config: ModelConfig) -> dict[str, int]:
    """The dims that the table's letters stand for."""
    return {
        "V": config.vocab_size,
        "P": config.num_positions or 0,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "O": config.num_labels or 1,
    }
