"""What a compiled program does in one execution on one device: products, collectives, memory traffic.

Counted from the optimised HLO, each loop's body as often as it goes round, which XLA's own `cost_analysis` does not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxalign.plan import kernels
from jaxalign.plan.hlo import Computation, Instruction, Module, Shape, groups, parse
from jaxalign.plan.trips import Scalars, tuple_index, unchanged

# Shares of all pairs of a query and a key that attention kernels go through: half of them where rows are causal.
CAUSAL = 0.5

# What costs no kernel: it names, or it only waits.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain", "async-update", "copy-done", "async-done", "send-done", "recv-done",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "Assume", "GatherScatterIndices", "Sharding", "SPMD")
_SCATTERED = re.compile(r"all-reduce-scatter")  # how a TPU writes a reduce-scatter: a fusion of that name
_WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
_PIECES = {"ag": "all-gather", "rs": "reduce-scatter"}
_CHAIN = re.compile(r"channel_id=(\d+)")
_IS_SYNC = re.compile(r'"is_sync":true')
# How JAX names the collectives that a program asks for by itself, inside `shard_map`.
_ASKED = re.compile(r"/(all_gather|psum|psum_scatter|reduce_scatter|ppermute|all_to_all|pmax|pmin|pbroadcast)[^/]*$")
_LARGEST = 12
_THROUGH = kernels.HANDED_ON | {"dynamic-slice", "slice", "copy-start", "copy-done", "all-gather-done", "opt-barrier"}


class Product(NamedTuple):
    """A matmul, as often as it is executed."""

    name: str
    dtypes: tuple[str, ...]  # of the two inputs
    result_dtype: str
    flops: float  # of one execution, one device
    times: int
    op_name: str
    what: str = "dot"  # or "attention", with "dq", "dkv" for its gradients: a kernel's, from its operands' shapes

    @property
    def total(self) -> float:
        """FLOPs of all executions."""
        return self.flops * self.times


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
    between_flops: float  # of products between start and done, in the order of the schedule
    between_bytes: float  # of memory traffic there, that of products included
    op_name: str
    piece_of: str = ""  # "all-gather" or "reduce-scatter": a permute by which a TPU does one of them beside products
    source: str = ""  # where what is moved is an argument of the program, or cast or cut out of one: its name
    name: str = ""

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
    kernels: int  # executed
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
    reader = _Reader(parse(text), trips, visible)
    part = reader.run(reader.module.entry, Scalars(reader.module, reader.module.entry), "", {})
    return Account(
        products=tuple(part.products),
        collectives=tuple(part.collectives),
        traffic_bytes=part.traffic,
        product_bytes=part.product_bytes,
        kernels=part.kernels,
        largest=tuple(sorted(reader.arrays, key=lambda a: -a.shape.bytes)[:_LARGEST]),
        num_devices=reader.module.num_devices,
        assumed_trips=reader.assumed,
        branches=tuple(reader.branches),
        unknown_kernels=tuple(dict.fromkeys(reader.unknown)),
        visible=visible,
    )


class _Part:
    """What some instructions do when each is executed once."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.collectives: list[Collective] = []
        self.traffic = self.product_bytes = self.flops = 0.0
        self.kernels = 0

    def add(self, other: _Part, times: int = 1) -> None:
        self.products += [p._replace(times=p.times * times) for p in other.products]
        self.collectives += [c._replace(times=c.times * times) for c in other.collectives]
        self.traffic += other.traffic * times
        self.product_bytes += other.product_bytes * times
        self.flops += other.flops * times
        self.kernels += other.kernels * times


# What a loop's tuple, or an entry's parameters, hold: names of arguments by position.
_Sources = dict[tuple[int, int | None], str]


class _Reader:
    def __init__(self, module: Module, trips: int | Mapping[str, int], visible: float):
        self.module, self._trips, self._visible = module, trips, visible
        self.assumed: dict[str, int] = {}
        self.branches: list[str] = []
        self.unknown: list[str] = []
        self.arrays: list[Array] = []
        self._chains: set[str] = set()

    def run(self, computation: Computation, scalars: Scalars, loop: str, sources: _Sources) -> _Part:
        """All instructions of a computation.

        Args:
          computation: whose instructions are executed one by one.
          scalars: the integers known in it.
          loop: the innermost loop around it.
          sources: of its parameters, where they are arguments of the program.
        """
        total = _Part()
        started: dict[str, tuple[int, float, float]] = {}  # place in `total`, FLOPs and bytes done before
        for x in computation.instructions:
            done = total.flops, total.traffic + total.product_bytes
            chain = self._chain(x)
            ended = chain or (x.operands[0] if x.opcode.endswith("-done") else "")
            if ended in started:
                at, flops, moved = started[ended]
                total.collectives[at] = total.collectives[at]._replace(
                    between_flops=done[0] - flops, between_bytes=done[1] - moved
                )
            part = self._part(computation, x, scalars, loop, sources)
            if part is None:
                continue
            if chain and chain in self._chains:  # it goes on with what an earlier fusion has begun
                part.collectives.clear()
            elif part.collectives and (chain or x.opcode.endswith("-start")):
                started[chain or x.name] = (len(total.collectives), done[0], done[1])
                self._chains.add(chain)
            total.add(part)
        return total

    def _chain(self, x: Instruction) -> str:
        """What fusions have in common by which a TPU begins, goes on with and ends one collective; "" of others."""
        y = self._fused(x)[1] if x.opcode == "fusion" else None
        found = _CHAIN.search(y.attributes) if y is not None and "chain_id" in y.attributes else None
        return found[1] if found else ""

    def _fused(self, x: Instruction) -> tuple[Computation, Instruction | None]:
        """The computation that a fusion calls, and the collective in it."""
        inner = self.module.computations[x.called("calls")[0]]
        return inner, next(
            (y for y in inner.instructions if y.opcode.removesuffix("-start") in kernels.COLLECTIVES), None
        )

    def _part(
        self, computation: Computation, x: Instruction, scalars: Scalars, loop: str, sources: _Sources
    ) -> _Part | None:
        if x.opcode in _FREE or (x.opcode.endswith("-done") and x.opcode.removesuffix("-done") in kernels.COLLECTIVES):
            return None
        if x.opcode == "custom-call" and kernels.target(x).startswith(_FREE_CALLS):
            return None
        total = _Part()
        if x.opcode == "while":
            body = self.module.computations[x.called("body")[0]]
            turns = scalars.trip_count(x)
            if turns is None:
                turns = self._assumed(x)
            inner = self._sources_of_loop(computation, x, body, sources)
            total.add(self.run(body, scalars.of_turn(x), x.op_name or x.name, inner), turns)
            return total
        if x.opcode == "conditional":
            names = x.called("branches", "true_computation", "false_computation")
            parts = [self._called(name, loop) for name in names]
            self.branches.append(x.op_name or x.name)
            return max(parts, key=lambda p: (p.flops, p.traffic + p.product_bytes))
        if x.opcode == "call":
            return self._called(x.called("to_apply")[0], loop)
        self._remember(x)
        collective = self._collective(computation, x, loop, sources)
        if collective is not None:
            total.collectives.append(collective)
            total.kernels += 1
            if x.opcode != "fusion":
                return total
        found = list(kernels.products(self.module, computation, x, self._visible))
        if x.opcode == "async-start":
            for name in x.called("calls"):
                total.add(self._called(name, loop))
            return total
        for p in found:
            total.products.append(Product(x.name, p.dtypes, p.result_dtype, p.flops, 1, p.op_name or x.op_name, p.what))
        total.flops += sum(p.flops for p in found)
        moved = kernels.traffic(self.module, computation, x)
        if found:
            total.product_bytes += moved
        elif collective is None:
            total.traffic += moved
        if x.opcode == "custom-call" and not found:
            self.unknown.append(kernels.target(x))
        total.kernels += collective is None
        return total

    def _called(self, name: str, loop: str) -> _Part:
        called = self.module.computations[name]
        return self.run(called, Scalars(self.module, called), loop, {})

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

    def _collective(self, computation: Computation, x: Instruction, loop: str, sources: _Sources) -> Collective | None:
        asynchronous = x.opcode.endswith("-start") or bool(self._chain(x))
        kind, at, operand = x.opcode.removesuffix("-start"), x, x.operands[0] if x.operands else ""
        if kind in ("async", "fusion"):
            # A collective wrapped to be asynchronous, or fused with what is done beside it.
            inner, fused = self._fused(x)
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
        members = groups(at, self.module.num_devices)
        return Collective(
            kind=kind,
            dtype=max(larger, key=lambda s: s.bytes).dtype,
            bytes=sum(s.bytes for s in larger),
            group_size=max(len(g) for g in members),
            groups=members,
            times=1,
            loop=loop,
            asynchronous=asynchronous and not _IS_SYNC.search(x.attributes),
            between_flops=0.0,
            between_bytes=0.0,
            op_name=at.op_name or x.op_name,
            piece_of=self._piece(computation, x) if kind == "collective-permute" else "",
            source=self._source(computation, operand, sources) if operand else "",
            name=x.name,
        )

    def _piece(self, computation: Computation, x: Instruction) -> str:
        """Of which collective a permute is a piece: it stands in the loop of a windowed product, or hands to or takes
        from one."""
        own = _WINDOWED.search(computation.name)
        if own:
            return _PIECES[own[1]]
        pending, seen = [x], {x.name}
        while pending:
            y = pending.pop()
            near = list(computation.users.get(y.name, []))
            near += [computation.by_name[name] for name in y.operands[:1]] if y.opcode != "tuple" else []
            for z in near:
                found = _WINDOWED.search(z.attributes) if z.opcode == "while" else None
                if found:
                    return _PIECES[found[1]]
                if z.name not in seen and (
                    z.opcode.startswith(("collective-permute", "get-tuple-element", "copy", "bitcast"))
                    or (z.opcode == "tuple" and z.name != computation.root)
                ):
                    seen.add(z.name)
                    pending.append(z)
        return ""

    def _sources_of_loop(
        self, computation: Computation, loop: Instruction, body: Computation, sources: _Sources
    ) -> _Sources:
        start = computation.by_name[loop.operands[0]]
        if start.opcode != "tuple":
            return {}
        found = ((i, self._source(computation, name, sources)) for i, name in enumerate(start.operands))
        return {(0, i): name for i, name in found if name and unchanged(body, i)}

    def _source(self, computation: Computation, name: str, sources: _Sources) -> str:
        """The program's argument that an array is, or is cut out of or cast from; "" of a computed one."""
        index: int | None = None
        while True:
            x = computation.by_name[name]
            if x.opcode == "parameter":
                if computation is self.module.entry:
                    return x.op_name or x.name
                return sources.get((int(x.literal), index), "")
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

    def _cut_from(self, x: Instruction, index: int | None) -> int | None:
        """The operand that a fusion's result, or one of several, is cut out of or cast from."""
        inner = self.module.computations[x.called("calls")[0]]
        y = inner.by_name[inner.root]
        if y.opcode == "tuple" and index is not None:
            y = inner.by_name[y.operands[index]]
        while y.opcode in _THROUGH:
            y = inner.by_name[y.operands[0]]
        return int(y.literal) if y.opcode == "parameter" else None
