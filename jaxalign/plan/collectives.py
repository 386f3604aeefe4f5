"""The collectives of a compiled program: what they move, among whom, and what they are there for."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxalign.plan import kernels
from jaxalign.plan.hlo import Computation, Instruction, Module, groups
from jaxalign.plan.sources import Sources

# A TPU writes a reduce-scatter as a fusion of this name, and may gather or scatter piece by piece beside its products.
_SCATTERED = re.compile(r"all-reduce-scatter")
_WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
_PIECES = {"ag": "all-gather", "rs": "reduce-scatter"}
_TAKEN_THROUGH = ("collective-permute", "copy", "bitcast", "get-tuple-element")
_CHAIN = re.compile(r"channel_id=(\d+)")
_RINGS = re.compile(r'"phase_rings"')  # of a collective on a TPU's SparseCore
_IS_SYNC = re.compile(r'"is_sync":true')
# How JAX names the collectives that a program asks for by itself, inside `shard_map`.
_ASKED = re.compile(r"/(all_gather|psum|psum_scatter|reduce_scatter|ppermute|all_to_all|pmax|pmin|pbroadcast)[^/]*$")


class Stretch(NamedTuple):
    """Work in a schedule between the starts and ends of asynchronous collectives, of one execution."""

    number: int  # of a program
    flops: float  # of products
    bytes: float  # of memory traffic, that of products included


class Collective(NamedTuple):
    """A collective, as often as it is executed."""

    kind: str  # as HLO names it
    dtype: str  # of the largest array
    bytes: int  # of the larger side: what a device has in full, of one execution
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    loop: str  # op_name, or name, of the innermost loop around it; "" outside
    asynchronous: bool
    between: tuple[Stretch, ...]  # its start and its done; others may wait for the same
    op_name: str
    piece_of: str = ""  # "all-gather" or "reduce-scatter": a permute by which a TPU does one of them beside products
    source: str = ""  # where what is moved is an argument of the program, or cast or cut out of one: its name
    name: str = ""
    read: int = 0  # of an all-reduce: bytes of the result that kernels read
    rings: int = 0  # that it takes, each one way along one link; 0: as many as there are

    @property
    def between_flops(self) -> float:
        """Of products between start and done."""
        return sum(each.flops for each in self.between)

    @property
    def could_scatter(self) -> bool:
        """Whether it sums whole what each device then takes its part of: a reduce-scatter moves half."""
        return self.kind == "all-reduce" and 0 < self.read <= self.bytes / self.group_size

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one execution, by a ring."""
        share = (self.group_size - 1) / max(self.group_size, 1)
        if self.kind == "all-reduce":
            return 2 * self.bytes * share
        return self.bytes * (1.0 if self.kind in ("collective-permute", "collective-broadcast") else share)

    @property
    def asked(self) -> bool:
        """Whether the traced function calls for it by name."""
        return bool(_ASKED.search(self.op_name))


def read(module: Module, computation: Computation, x: Instruction, sources: Sources, loop: str) -> Collective | None:
    """The collective that an instruction is or begins; None of another instruction.

    Args:
      module: the program.
      computation: where the instruction stands.
      x: the instruction.
      sources: which parameters of the computation are arguments of the program.
      loop: the innermost loop around it.
    """
    asynchronous = x.opcode.endswith("-start") or bool(chain(module, x))
    kind, at, operand = x.opcode.removesuffix("-start"), x, x.operands[0] if x.operands else ""
    if kind in ("async", "fusion"):
        # A collective wrapped to be asynchronous, or fused with what is done beside it.
        inner, fused = _fused(module, x)
        if fused is None:
            return None
        kind, at = fused.opcode.removesuffix("-start"), fused
        if kind == "all-reduce" and _SCATTERED.search(f"{inner.name} {x.name}"):
            kind = "reduce-scatter"
        operands = [s for name in at.operands for s in inner.by_name[name].shapes]
        results = list(at.shapes)
        moved = inner.by_name[at.operands[0]]
        operand = x.operands[int(moved.literal)] if moved.opcode == "parameter" else ""
    elif kind in kernels.COLLECTIVES:
        operands = [s for name in x.operands for s in computation.by_name[name].shapes]
        results = list(x.shapes)
        if asynchronous:
            done = [y for y in computation.users.get(x.name, []) if y.opcode.endswith("-done")]
            results = list(done[0].shapes) if done else []
    else:
        return None
    larger = max(operands, results, key=lambda shapes: sum(s.bytes for s in shapes))
    members = groups(at, module.num_devices)
    return Collective(
        kind=kind,
        dtype=max(larger, key=lambda s: s.bytes).dtype,
        bytes=sum(s.bytes for s in larger),
        group_size=max(len(g) for g in members),
        groups=members,
        times=1,
        loop=loop,
        asynchronous=asynchronous and not _IS_SYNC.search(x.attributes),
        between=(),
        op_name=at.op_name or x.op_name,
        piece_of=_piece(computation, x) if kind == "collective-permute" else "",
        source=sources.of(operand) if operand else "",
        name=x.name,
        read=_read(module, computation, x) if kind == "all-reduce" else 0,
        rings=len(_RINGS.findall(at.attributes)),
    )


def chain(module: Module, x: Instruction) -> str:
    """What fusions have in common by which a TPU begins, goes on with and ends one collective; "" of others."""
    y = _fused(module, x)[1] if x.opcode == "fusion" else None
    found = _CHAIN.search(y.attributes) if y is not None and "chain_id" in y.attributes else None
    return found[1] if found else ""


def _fused(module: Module, x: Instruction) -> tuple[Computation, Instruction | None]:
    """The computation that a fusion calls, and the collective in it."""
    inner = module.computations[x.called("calls")[0]]
    return inner, next((y for y in inner.instructions if y.opcode.removesuffix("-start") in kernels.COLLECTIVES), None)


def _read(module: Module, computation: Computation, x: Instruction) -> int:
    """Bytes of a collective's result that kernels read; all of it where it is handed on."""
    total = 0
    for user in computation.users.get(x.name, []):
        if user.opcode in ("tuple", "while", "call", "conditional"):
            return x.bytes
        if user.opcode.endswith("-done") or user.opcode in ("get-tuple-element", "bitcast", "copy-start"):
            total += _read(module, computation, user)
        else:
            numbers = [i for i, name in enumerate(user.operands) if name == x.name]
            total += sum(kernels.read(module, computation, user, i) for i in numbers)
    return total


def _piece(computation: Computation, x: Instruction) -> str:
    """Of which collective a permute is a piece: it stands in the loop of a windowed product, or hands to one or takes
    from one."""
    own = _WINDOWED.search(computation.name)
    if own:
        return _PIECES[own[1]]

    def takes(y: Instruction) -> list[Instruction]:
        return [computation.by_name[name] for name in y.operands[:1]]

    def hands(y: Instruction) -> list[Instruction]:
        return computation.users.get(y.name, [])

    for near, through in ((hands, ("collective-permute", "copy", "bitcast", "tuple")), (takes, _TAKEN_THROUGH)):
        pending = [x]
        while pending:
            for z in near(pending.pop()):
                found = _WINDOWED.search(z.attributes) if z.opcode == "while" else None
                if found:
                    return _PIECES[found[1]]
                if z.opcode.startswith(through) and z.name != computation.root:
                    pending.append(z)
    return ""
