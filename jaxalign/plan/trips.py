"""How often a loop of a compiled program goes round: said by the compiler, or found from its counter's first turns."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

from jaxalign.plan.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"\bdirection=(\w+)")

# What hands on its first operand, as far as a counter is concerned.
_SAME = {"copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "opt-barrier", "broadcast"}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "minimum": min,
    "maximum": max,
    "shift-left": operator.lshift,
}

Arguments = Callable[[int, int | None], int | None]  # (number of a parameter, index in its tuple) -> a scalar, if known


class Scalars:
    """The integers of a computation that are known without running it."""

    def __init__(self, module: Module, computation: Computation, arguments: Arguments = lambda *_: None):
        self._module, self.computation, self._arguments = module, computation, arguments
        self._known: dict[tuple[str, int | None], int | None] = {}

    def value(self, name: str, index: int | None = None) -> int | None:
        """Of an instruction, or of one element of the tuple that it gives; None where it is not known."""
        key = (name, index)
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self._value(self.computation.by_name[name], index)
        return self._known[key]

    def _value(self, x: Instruction, index: int | None) -> int | None:
        if x.opcode == "constant":
            return int(x.literal) if re.fullmatch(r"-?\d+", x.literal) else None
        if x.opcode == "parameter":
            return self._arguments(int(x.literal), index)
        if x.opcode == "get-tuple-element":
            return self.value(x.operands[0], tuple_index(x)) if index is None else None
        if x.opcode == "tuple" and index is not None:
            return self.value(x.operands[index])
        if x.opcode in _SAME:
            return self.value(x.operands[0], index)
        if x.opcode in _ARITHMETIC:
            a, b = (self.value(name) for name in x.operands)
            return None if a is None or b is None else _ARITHMETIC[x.opcode](a, b)
        if x.opcode in ("fusion", "call"):
            inner = self.inside(x.called("calls", "to_apply")[0], x.operands)
            return inner.value(inner.computation.root, index)
        return None

    def inside(self, name: str, operands: Sequence[str]) -> Scalars:
        """What is known in a computation that is called with these operands."""
        called = self._module.computations[name]
        return Scalars(self._module, called, lambda number, i: self.value(operands[number], i))

    def of_turn(self, loop: Instruction) -> Scalars:
        """What is known in every turn of a loop in this computation: what its body hands on unchanged."""
        body = self._module.computations[loop.called("body")[0]]

        def argument(_: int, index: int | None) -> int | None:
            return (
                self.value(loop.operands[0], index)
                if index is not None and unchanged(self._module, body, index)
                else None
            )

        return Scalars(self._module, body, argument)

    def trip_count(self, loop: Instruction) -> int | None:
        """Turns of a `while` in this computation; None where they depend on data."""
        known = _KNOWN.search(loop.attributes)
        if known:
            return int(known[1])
        body, condition = (self._module.computations[loop.called(key)[0]] for key in ("body", "condition"))
        first = Scalars(self._module, condition, lambda _, i: self.value(loop.operands[0], i))
        turn = Scalars(self._module, body, lambda _, i: self.value(loop.operands[0], i))
        second = Scalars(self._module, condition, lambda _, i: None if i is None else turn.value(body.root, i))
        sides = [_compared(scalars) for scalars in (first, second)]
        if None in sides:
            return None
        (direction, a0, b0), (_, a1, b1) = sides  # type: ignore[misc]
        if direction in ("GT", "GE"):
            a0, b0, a1, b1 = b0, a0, b1, a1
        elif direction not in ("LT", "LE", "NE"):
            return None
        gap, closing = b0 - a0 + (direction in ("LE", "GE")), (b0 - a0) - (b1 - a1)
        return -(-gap // closing) if closing > 0 and gap >= 0 else None


def unchanged(module: Module, body: Computation, index: int) -> bool:
    """Whether a loop's body hands on an element of its tuple as it came, through loops inside it or not."""
    name, element = body.root, index
    while True:
        x = body.by_name[name]
        if x.opcode == "tuple":
            name = x.operands[element]
            x = body.by_name[name]
            if x.opcode != "get-tuple-element":
                return False
        if x.opcode == "get-tuple-element":
            name, element = x.operands[0], tuple_index(x)
        elif x.opcode == "while" and unchanged(module, module.computations[x.called("body")[0]], element):
            name = x.operands[0]
        else:
            return x.opcode == "parameter" and element == index


def tuple_index(x: Instruction) -> int:
    """Which element a `get-tuple-element` takes."""
    found = _INDEX.search(x.attributes)
    assert found is not None
    return int(found[1])


def _compared(scalars: Scalars) -> tuple[str, int, int] | None:
    """Direction and both sides of the comparison that a condition is; None where it is none or they are not known."""
    x = scalars.computation.by_name[scalars.computation.root]
    while x.opcode in ("fusion", "call") or x.opcode in _SAME:
        if x.opcode in _SAME:
            x = scalars.computation.by_name[x.operands[0]]
        else:
            scalars = scalars.inside(x.called("calls", "to_apply")[0], x.operands)
            x = scalars.computation.by_name[scalars.computation.root]
    direction = _DIRECTION.search(x.attributes)
    if x.opcode != "compare" or direction is None:
        return None
    a, b = (scalars.value(name) for name in x.operands)
    return None if a is None or b is None else (direction[1], a, b)
