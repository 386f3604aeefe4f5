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

    def of(self, name: str, index: int | None = None) -> str:
        """Of an instruction's result, or of one element of the tuple that it gives; "" of a computed one."""
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
            elif x.opcode == "fusion" and (number := self._cut_from(x, index)) is not None:
                name, index = x.operands[number], None
            else:
                return ""

    def of_turn(self, loop: Instruction) -> Sources:
        """Those in a loop's body, of what it hands on unchanged."""
        body = self._module.computations[loop.called("body")[0]]

        def argument(_: int, index: int | None) -> str:
            return self.of(loop.operands[0], index) if index is not None and unchanged(body, index) else ""

        return Sources(self._module, body, argument)

    def inside(self, name: str, operands: Sequence[str]) -> Sources:
        """Those in a computation that is called with these operands."""
        return Sources(self._module, self._module.computations[name], lambda n, index: self.of(operands[n], index))

    def _cut_from(self, x: Instruction, index: int | None) -> int | None:
        """The operand that a fusion's result, or one of several, is cut out of or cast from."""
        inner = self._module.computations[x.called("calls")[0]]
        y = inner.by_name[inner.root]
        if y.opcode == "tuple" and index is not None:
            y = inner.by_name[y.operands[index]]
        while y.opcode in _THROUGH:
            y = inner.by_name[y.operands[0]]
        return int(y.literal) if y.opcode == "parameter" else None
