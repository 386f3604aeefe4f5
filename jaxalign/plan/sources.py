"""Which arrays in a compiled program are its arguments, or cut out of or cast from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxalign.plan.hlo import Computation, Instruction, Module
from jaxalign.plan.kernels import HANDED_ON
from jaxalign.plan.trips import tuple_index, unchanged

_THROUGH = HANDED_ON | {"dynamic-slice", "slice", "copy-start", "copy-done", "all-gather-done", "opt-barrier"}


class Sources:
    """Names of the program's arguments that the arrays of a computation come from."""

    def __init__(
        self, module: Module, computation: Computation, arguments: Callable[[int, int | None], str] | None = None
    ):
        """
        Args:
          module: the program.
          computation: of it.
          arguments: (number of a parameter, index in its tuple) -> a name or ""; by default those of the parameters.
        """
        self._module, self._computation, self._arguments = module, computation, arguments

    def of(self, name: str, index: int | None = None, *, stacked: bool = False) -> str:
        """Of an instruction's result, or of one element of the tuple that it gives; "" of a computed one.

        Args:
          name: the instruction's.
          index: of an element.
          stacked: what is written into an array counts for all of it.
        """
        while True:
            x = self._computation.by_name[name]
            if x.opcode == "parameter":
                return self._arguments(int(x.literal), index) if self._arguments else x.op_name or x.name
            if x.opcode == "get-tuple-element":
                name, index = x.operands[0], tuple_index(x)
            elif x.opcode == "tuple" and index is not None:
                name, index = x.operands[index], None
            elif x.opcode in _THROUGH:
                name = x.operands[0]
            elif stacked and x.opcode == "dynamic-update-slice":
                name = x.operands[1]
            elif x.opcode == "fusion" and (number := self._cut_from(x, index, stacked)) is not None:
                name, index = x.operands[number], None
            elif x.opcode == "while" and index is not None:
                # Handed on unchanged, or stacked by its turns, as what is kept for a backward pass.
                body = self._module.computations[x.called("body")[0]]
                return self.of_turn(x).of(body.by_name[body.root].operands[index], stacked=True)
            else:
                return ""

    def of_turn(self, loop: Instruction) -> Sources:
        """Those in a loop's body, of what it hands on unchanged."""
        body = self._module.computations[loop.called("body")[0]]

        def argument(_: int, index: int | None) -> str:
            return (
                self.of(loop.operands[0], index) if index is not None and unchanged(self._module, body, index) else ""
            )

        return Sources(self._module, body, argument)

    def inside(self, name: str, operands: Sequence[str]) -> Sources:
        """Those in a computation that is called with these operands."""
        return Sources(self._module, self._module.computations[name], lambda n, index: self.of(operands[n], index))

    def _cut_from(self, x: Instruction, index: int | None, stacked: bool) -> int | None:
        """The operand that a fusion's result, or one of several, is cut out of or cast from."""
        inner = self._module.computations[x.called("calls")[0]]
        y = inner.by_name[inner.root]
        if y.opcode == "tuple" and index is not None:
            y = inner.by_name[y.operands[index]]
        while y.opcode in _THROUGH or (stacked and y.opcode == "dynamic-update-slice"):
            y = inner.by_name[y.operands[y.opcode == "dynamic-update-slice"]]
        return int(y.literal) if y.opcode == "parameter" else None
