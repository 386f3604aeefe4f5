"""What a compiled program does in one execution on one device: products, collectives, memory traffic.

Counted from the optimised HLO, each loop's body as often as it goes round, which XLA's own `cost_analysis` does not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.plan import collectives, kernels
from jaxalign.plan.collectives import Collective, Stretch
from jaxalign.plan.hlo import Computation, Instruction, Module, Shape, parse
from jaxalign.plan.sources import Sources
from jaxalign.plan.trips import Scalars

# Shares of all pairs of a query and a key that attention kernels go through: half of them where rows are causal.
CAUSAL = 0.5

# What costs no kernel: it names, or it only waits.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain", "async-update",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "Assume", "ConcatBitcast", "GatherScatterIndices", "Sharding", "SPMD")
_LARGEST = 12  # named


class Product(NamedTuple):
    """A matmul, as often as it is executed."""

    name: str
    dtypes: tuple[str, ...]  # of the two inputs
    result_dtype: str
    flops: float  # of one execution, one device
    times: int
    op_name: str
    bytes: int = 0  # of memory traffic of its kernel, of one execution
    what: str = "dot"  # or "attention", with "dq", "dkv" for its gradients: a kernel's, from its operands' shapes

    @property
    def total(self) -> float:
        """FLOPs of all executions."""
        return self.flops * self.times


class Kernel(NamedTuple):
    """A kernel without a product, as often as it is executed."""

    name: str
    bytes: int  # of memory traffic, of one execution
    times: int
    op_name: str


class Array(NamedTuple):
    """A result of an instruction."""

    name: str
    shape: Shape
    op_name: str


class Account(NamedTuple):
    """One execution of a program on one device."""

    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    traffic_bytes: float  # of kernels without a product: what they read and write in the device's main memory
    product_bytes: float  # the same of those with one
    host_bytes: float  # between the device and the host's memory
    kernels: int  # executed
    heaviest: tuple[Kernel, ...]  # of `traffic_bytes`, those that move most in all
    largest: tuple[Array, ...]  # temporary arrays, largest first
    num_devices: int
    assumed_trips: dict[str, int]  # loops whose trip count depends on data, and what was taken for it
    branches: tuple[str, ...]  # conditionals, of which the branch with most FLOPs was counted
    unknown_kernels: tuple[str, ...]  # custom calls of which only operands and results were counted
    visible: float  # share of pairs of a query and a key that attention kernels were taken to go through

    @property
    def flops(self) -> float:
        """Of all products, attention kernels included."""
        return sum(p.total for p in self.products)

    @property
    def attention_flops(self) -> float:
        """Of attention kernels."""
        return sum(p.total for p in self.products if p.what != "dot")

    def flops_outside(self, *dtypes: str) -> float:
        """FLOPs of products with an input that is of another dtype, such as "bf16"."""
        return sum(p.total for p in self.products if set(p.dtypes) - set(dtypes))

    def bytes_of(self, kind: str) -> float:
        """Bytes of all executions of a kind of collective, what a device has in full; pieces of one count as it."""
        total = 0.0
        for c in self.collectives:
            if c.kind == kind and not c.piece_of:
                total += c.bytes * c.times
            elif c.piece_of == kind:  # a ring of g devices sends g - 1 pieces of g
                total += c.bytes * c.times * c.group_size / (c.group_size - 1)
        return total

    def resharding(self) -> tuple[Collective, ...]:
        """Collectives that the program does not ask for and that neither a sharded parameter nor a sharded sum needs.

        Those are permutes and all-to-alls, and gathers of what is neither an argument nor cut or cast from one.  A
        gather of a computed array is listed even where a constraint on its sharding asks for it: the compiled program
        does not say who asked.
        """
        moving = ("all-to-all", "ragged-all-to-all", "collective-permute")
        return tuple(
            c
            for c in self.collectives
            if (c.kind in moving or (c.kind == "all-gather" and not c.source))
            and not (c.piece_of or c.asked)
            and c.group_size > 1
        )


def account(text: str, trips: int | Mapping[str, int] = 1, *, visible: float = CAUSAL) -> Account:
    """Counts what a program does.

    Args:
      text: `executable.as_text()`.
      trips: turns of loops whose count depends on data; of all of them, or by a part of the loop's op_name (others: 1).
      visible: share of all pairs of a query and a key that attention kernels go through.
    """
    reader = _Reader(parse(text), trips, visible, offloads="S(5)" in text)
    entry = reader.module.entry
    part = reader.run(entry, Scalars(reader.module, entry), Sources(reader.module, entry), "")
    return Account(
        products=tuple(part.products),
        collectives=tuple(part.collectives),
        traffic_bytes=part.traffic,
        product_bytes=part.product_bytes,
        host_bytes=part.host_bytes,
        kernels=part.kernels,
        heaviest=_heaviest(part.heaviest),
        largest=tuple(sorted(reader.arrays, key=lambda a: -a.shape.bytes)[:_LARGEST]),
        num_devices=reader.module.num_devices,
        assumed_trips=reader.assumed,
        branches=tuple(reader.branches),
        unknown_kernels=tuple(dict.fromkeys(reader.unknown)),
        visible=visible,
    )


def _heaviest(found: list[Kernel]) -> tuple[Kernel, ...]:
    """Those that move most, kernels of layers that are alike as one."""
    alike: dict[Any, Kernel] = {}
    for k in found:
        key = (re.sub(r"[.\d]+$", "", k.name), k.op_name, k.bytes)
        alike[key] = k._replace(times=k.times + (alike[key].times if key in alike else 0))
    return tuple(sorted(alike.values(), key=lambda k: -k.bytes * k.times)[:_LARGEST])


def _begun(computation: Computation, x: Instruction) -> Instruction:
    """What a `fusion-start` or `slice-start` begins, with the results that its `-done` gives."""
    opcode = x.opcode.removesuffix("-start")
    if opcode == x.opcode or opcode in kernels.COLLECTIVES | {"copy", "async", "send", "recv"}:
        return x
    done = [y for y in computation.users.get(x.name, []) if y.opcode.endswith("-done")]
    return x._replace(opcode=opcode, shapes=done[0].shapes if done else x.shapes[-1:])


class _Part:
    """What some instructions do when each is executed once."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.collectives: list[Collective] = []
        self.heaviest: list[Kernel] = []
        self.traffic = self.product_bytes = self.host_bytes = self.flops = 0.0
        self.kernels = 0
        self.work: list[Stretch] = []
        self.cut = 0.0, 0.0  # FLOPs and bytes up to the last of them

    def add(self, other: _Part, times: int = 1) -> None:
        self.products += [p._replace(times=p.times * times) for p in other.products]
        self.collectives += [c._replace(times=c.times * times) for c in other.collectives]
        self.heaviest += [k._replace(times=k.times * times) for k in other.heaviest]
        self.traffic += other.traffic * times
        self.host_bytes += other.host_bytes * times
        self.product_bytes += other.product_bytes * times
        self.flops += other.flops * times
        self.kernels += other.kernels * times


class _Reader:
    def __init__(self, module: Module, trips: int | Mapping[str, int], visible: float, offloads: bool):
        self.module, self._trips, self._visible, self._offloads = module, trips, visible, offloads
        self.assumed: dict[str, int] = {}
        self.branches: list[str] = []
        self.unknown: list[str] = []
        self.arrays: list[Array] = []
        self._chains: set[str] = set()
        self._stretches = 0

    def run(self, computation: Computation, scalars: Scalars, sources: Sources, loop: str) -> _Part:
        """All instructions of a computation.

        Args:
          computation: whose instructions are executed one by one.
          scalars: the integers known in it.
          sources: which of its parameters are arguments of the program.
          loop: the innermost loop around it.
        """
        total = _Part()
        started: dict[str, tuple[int, int]] = {}  # place in `total`, stretches of work before it
        for x in computation.instructions:
            chain = collectives.chain(self.module, x)
            ended = chain or (x.operands[0] if x.opcode.endswith("-done") else "")
            if ended in started:
                at, first = started[ended]
                total.collectives[at] = total.collectives[at]._replace(between=tuple(self._cut(total)[first:]))
            part = self._part(computation, x, scalars, sources, loop)
            if part is None:
                continue
            if chain and chain in self._chains:  # it goes on with what an earlier fusion has begun
                part.collectives.clear()
            elif part.collectives and (chain or x.opcode.endswith("-start")):
                if x.opcode == "call-start":  # beside the schedule, on another core
                    part.collectives = [c._replace(asynchronous=True) for c in part.collectives]
                started[chain or x.name] = (len(total.collectives), len(self._cut(total)))
                self._chains |= {chain} - {""}
            total.add(part)
        return total

    def _cut(self, total: _Part) -> list[Stretch]:
        """The work up to here, cut where collectives start and end."""
        flops, moved = total.flops, total.traffic + total.product_bytes
        if (flops, moved) != total.cut:
            total.work.append(Stretch(self._stretches, flops - total.cut[0], moved - total.cut[1]))
            total.cut, self._stretches = (flops, moved), self._stretches + 1
        return total.work

    def _part(
        self, computation: Computation, x: Instruction, scalars: Scalars, sources: Sources, loop: str
    ) -> _Part | None:
        if x.opcode in _FREE or x.opcode.endswith("-done"):
            return None
        x = _begun(computation, x)
        if x.opcode == "custom-call" and kernels.target(x).startswith(_FREE_CALLS):
            return None
        total = _Part()
        if x.opcode == "while":
            body = self.module.computations[x.called("body")[0]]
            turns = scalars.trip_count(x)
            if turns is None:
                turns = self._assumed(x)
            total.add(self.run(body, scalars.of_turn(x), sources.of_turn(x), x.op_name or x.name), turns)
            return total
        if x.opcode == "conditional":
            names = x.called("branches", "true_computation", "false_computation")
            parts = [
                self._called(name, [operand], scalars, sources, loop)
                for name, operand in zip(names, x.operands[1:], strict=True)
            ]
            self.branches.append(x.op_name or x.name)
            return max(parts, key=lambda p: (p.flops, p.traffic + p.product_bytes))
        if x.opcode == "call":
            return self._called(x.called("to_apply")[0], x.operands, scalars, sources, loop)
        self._remember(x)
        collective = collectives.read(self.module, computation, x, sources, loop)
        if collective is not None:
            total.collectives.append(collective)
            total.kernels += 1
            if x.opcode != "fusion":
                return total
        found = list(kernels.products(self.module, computation, x, self._visible))
        if x.opcode == "async-start":
            for name in x.called("calls"):
                total.add(self._called(name, x.operands, scalars, sources, loop))
            return total
        moved = kernels.traffic(self.module, computation, x)
        for i, p in enumerate(found):
            op_name = p.op_name or x.op_name
            own = 0 if i else moved  # of several products in a kernel the first has its traffic
            total.products.append(Product(x.name, p.dtypes, p.result_dtype, p.flops, 1, op_name, own, p.what))
        total.flops += sum(p.flops for p in found)
        if found:
            total.product_bytes += moved
        elif collective is None:
            total.traffic += moved
            total.heaviest.append(Kernel(x.name, moved, 1, x.op_name))
        if self._offloads:
            total.host_bytes += kernels.traffic(self.module, computation, x, host=True)
        if x.opcode == "custom-call" and not found:
            self.unknown.append(kernels.target(x))
        total.kernels += collective is None and not self._is_scalar(x)
        return total

    def _is_scalar(self, x: Instruction) -> bool:
        """Whether a TPU does it beside its kernels: numbers of a loop's counter, or a copy between memories."""
        return self.module.tiled and (x.opcode == "copy-start" or all(shape.size <= 1 for shape in x.shapes))

    def _called(self, name: str, operands: Sequence[str], scalars: Scalars, sources: Sources, loop: str) -> _Part:
        inside = scalars.inside(name, operands), sources.inside(name, operands)
        return self.run(self.module.computations[name], *inside, loop)

    def _assumed(self, x: Instruction) -> int:
        name = x.op_name or x.name
        if isinstance(self._trips, int):
            turns = self._trips
        else:
            turns = next((n for part, n in self._trips.items() if part in name), 1)
        self.assumed[name] = turns
        return turns

    def _remember(self, x: Instruction) -> None:
        if x.opcode.endswith("-start"):
            return
        self.arrays += [
            Array(x.name, shape, x.op_name) for shape in x.shapes if not self.module.tiled or not shape.space
        ]
        if len(self.arrays) > 1000:
            self.arrays = sorted(self.arrays, key=lambda a: -a.shape.bytes)[:_LARGEST]
