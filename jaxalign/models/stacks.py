"""Layers in several stacks: where some are trained and others are not, each run of layers of one kind lies by itself.

Layers are stacked, `layers/mlp/up/kernel` [L, D, F].  Of a model that is cut at layer 30 of 32 there are
`layers/0-29/mlp/up/kernel` [30, D, F] and `layers/30-31/mlp/up/kernel` [2, D, F]: one path has what is trained of some
layers, another what is frozen, and nothing lies in both.  A path without numbers stands for all layers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.trees import by_path, from_paths
from jaxalign.types import Params

Cuts = tuple[int, ...] | None  # layers at which another stack begins; None: there is one stack
_NUMBERS = re.compile(r"(\d+)-(\d+)")


class Stack(NamedTuple):
    """Layers that lie together."""

    start: int
    stop: int
    layers: Params  # [stop - start, ...]


class Place(NamedTuple):
    """Where a parameter lies: its path in a model of one stack, and its layers."""

    path: str
    start: int = 0
    stop: int | None = None  # None: all layers, or none


def place(path: str) -> Place:
    """The place at a path.

    >>> place("layers/30-31/mlp/up/kernel")
    Place(path='layers/mlp/up/kernel', start=30, stop=32)
    >>> place("layers/mlp/up/kernel")
    Place(path='layers/mlp/up/kernel', start=0, stop=None)
    """
    first, _, rest = path.partition("/")
    numbers, _, own = rest.partition("/")
    if first == "layers" and (match := _NUMBERS.fullmatch(numbers)):
        return Place(f"layers/{own}", int(match[1]), int(match[2]) + 1)
    return Place(path)


def cut(layers: Params, cuts: Cuts) -> Params:
    """Stacked layers in several stacks; arrays are sliced, shapes alike.

    Args:
      layers: [L, ...].
      cuts: as `ModelConfig.cuts` has them.

    >>> {name: own["scale"].tolist() for name, own in cut({"scale": jnp.arange(3)}, (2,)).items()}
    {'0-1': [0, 1], '2-2': [2]}
    """
    if cuts is None:
        return layers
    ends = (0, *cuts, len_of(layers))

    def part(x: Any, start: int, stop: int) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((stop - start, *x.shape[1:]), x.dtype)
        return x[start:stop]

    return {
        f"{start}-{stop - 1}": jax.tree.map(lambda x, start=start, stop=stop: part(x, start, stop), layers)
        for start, stop in itertools.pairwise(ends)
    }


def stacks(layers: Params) -> list[Stack]:
    """The stacks of a model's layers, one or several, in the order of their layers."""
    found = [(_NUMBERS.fullmatch(name), own) for name, own in layers.items()]
    if not all(match for match, _ in found):
        return [Stack(0, len_of(layers), layers)]
    return sorted((Stack(int(m[1]), int(m[2]) + 1, own) for m, own in found if m), key=lambda one: one.start)


def every(layers: Params, first: int, step: int) -> Params:
    """Of several stacks the layers first, first + step, ... as one.

    Args:
      layers: all of a model.
      first: less than `step`.
      step: how many layers on the next one is.
    """
    parts = []
    for start, stop, own in stacks(layers):
        if (ahead := (first - start) % step) < stop - start:
            parts.append(jax.tree.map(lambda x, ahead=ahead: x[ahead::step], own))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *own: jnp.concatenate(own), *parts)


def shapes_of(layers: Params, number: int) -> Params:
    """So many layers of a model as one stack: shapes, dtypes and shardings."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(one, stacks(layers)[0].layers)


def len_of(layers: Params) -> int:
    """How many layers one stack has."""
    return jax.tree.leaves(layers)[0].shape[0]


class Stacked(NamedTuple):
    """One parameter of some or all layers, which lies in several stacks."""

    num_layers: int  # L of the model
    parts: tuple[tuple[int, Any], ...]  # by their first layer, arrays [n, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all layers."""
        return (self.num_layers, *self.parts[0][1].shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts[0][1].dtype

    def at(self, layer: int) -> tuple[Any, int]:
        """The array in which a layer lies, and where in it."""
        return next((x, layer - start) for start, x in self.parts if start <= layer < start + x.shape[0])


def leaves(params: Params, num_layers: int) -> dict[str, Any]:
    """Parameters by their paths in a model of one stack: arrays, or `Stacked`.

    Args:
      params: of a model, all or some.
      num_layers: L of the model.
    """
    found: dict[str, Any] = {}
    for path, x in by_path(params).items():
        whole, start, stop = place(path)
        if stop is None:
            found[whole] = x
        else:
            before = found[whole].parts if whole in found else ()
            found[whole] = Stacked(num_layers, (*before, (start, x)))
    return found


def uncut(abstract: Params) -> Params:
    """Shapes of a whole model's parameters in one stack."""
    return from_paths({
        path: jax.ShapeDtypeStruct((sum(part.shape[0] for _, part in x.parts), *x.shape[1:]), x.dtype)
        if isinstance(x, Stacked) else x
        for path, x in leaves(abstract, 0).items()
    })  # fmt: skip


def changes(found: Iterable[Sequence[bool]]) -> Cuts:
    """The cuts between layers of which different parameters are trained.

    Args:
      found: of each parameter, whether it is trained, by layer.

    >>> changes([(False, False, True), (False, False, False)]), changes([(True, True, True)])
    ((2,), None)
    """
    kinds = list(zip(*found, strict=True))
    return tuple(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]) or None
