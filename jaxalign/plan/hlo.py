"""Optimised HLO as text (`executable.as_text()`) of CPU, GPU and TPU programs, read into instructions with shapes.

Only what an account of a program needs is read: names, opcodes, shapes, operands, and attributes as they stand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

# Bytes of one number; fractions are packed.
_BYTES = {"pred": 1.0, "c64": 8.0, "c128": 16.0, "token": 0.0, "opaque": 0.0}

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLS = ("calls", "to_apply", "body", "condition", "true_computation", "false_computation", "branches")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_NUMBERS = re.compile(r"-?\d+")
_ARRAY = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=\{?(?:@?)mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_REPLICAS = re.compile(r"replica_count=(\d+)")


class Shape(NamedTuple):
    """An array's dtype and dimensions, and the memory space that its layout names (0: the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What they take, without padding.

        >>> Shape("bf16", (4, 8)).bytes, Shape("pred", (3,)).bytes, Shape("s4", (4,)).bytes
        (64, 3, 2)
        """
        return math.ceil(self.size * bytes_of(self.dtype))


class Instruction(NamedTuple):
    """One line: `name = shapes opcode(operands), attributes`; a tuple's shapes are its leaves in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""  # what stands in the parentheses of a constant or a parameter

    @property
    def op_name(self) -> str:
        """Where the traced function made it, as JAX names it; "" where nothing says so."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def bytes(self) -> int:
        """Of all its results."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that it calls under these attributes; all but reductions' without any."""
        keys = keys or ("calls", "body", "condition", "true_computation", "false_computation")
        names = [name for key, name in _CALLED.findall(self.attributes) if key in keys]
        if "branches" in keys:
            names += [n for group in _BRANCHES.findall(self.attributes) for n in _OPERAND.findall(group)]
        return names

    def numbers(self, key: str) -> tuple[int, ...]:
        """The integers of an attribute such as `lhs_contracting_dims={1,2}`; () where it is not there."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return tuple(map(int, _NUMBERS.findall(found[1]))) if found else ()


class _Named(dict):
    """By name or number; of one that is not there it says what is missing."""

    def __init__(self, what: str, items: Any = ()):
        super().__init__(items)
        self._what = what

    def __missing__(self, name: Any) -> Any:
        raise ValueError(f"no {self._what} {name!r} in this text")


@dataclasses.dataclass
class Computation:
    """Instructions in the order of the text, which is the schedule's for those that are executed one by one."""

    name: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    root: str = ""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return _Named(f"instruction of {self.name},", ((x.name, x) for x in self.instructions))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that have a name as an operand, by that name."""
        found: dict[str, list[Instruction]] = {}
        for x in self.instructions:
            for name in dict.fromkeys(x.operands):
                found.setdefault(name, []).append(x)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their number."""
        found = ((int(x.literal), x.name) for x in self.instructions if x.opcode == "parameter")
        return _Named(f"parameter of {self.name},", found)


class Module(NamedTuple):
    """A program."""

    name: str
    computations: dict[str, Computation]
    entry: Computation
    num_devices: int  # that run it together
    tiled: bool  # whether layouts name tiles, as on a TPU


def parse(text: str) -> Module:
    """Reads a program's text.

    Args:
      text: what `executable.as_text()` gives, after all of the compiler's passes.

    Raises:
      ValueError: it is cut off, has no entry computation, or uses what comes later, which no schedule does.

    >>> module = parse('''HloModule m, num_partitions=2
    ... ENTRY %main (x: f32[2,3]) -> f32[2,4] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   %w = f32[3,4]{1,0} constant({...})
    ...   ROOT %dot = f32[2,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }''')
    >>> module.entry.by_name[module.entry.root].operands
    ('x', 'w')
    """
    computations: dict[str, Computation] = _Named("computation")
    waited: set[str] = set()  # names that were used and not there yet
    entry: Computation | None = None
    current: Computation | None = None
    seen: set[str] = set()  # instructions of the current computation
    missed: set[str] = set()  # operands that were not there yet
    lines: list[str] = []  # of the instruction that is being read: a kernel's attributes may go over several

    def finish() -> None:
        if lines and current is not None:
            instruction, is_root = _instruction("\n".join(lines))
            current.instructions.append(instruction)
            missed.update(name for name in instruction.operands if name not in seen)
            seen.add(instruction.name)
            if "=%" in instruction.attributes or "={%" in instruction.attributes:
                waited.update(name for name in instruction.called(*_CALLS) if name not in computations)
            if instruction.name in missed:
                raise ValueError(f"instruction {instruction.name!r} of {current.name} comes after its use")
            if is_root:
                current.root = instruction.name
        lines.clear()

    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current, seen, missed = Computation(header[2]), set(), set()
                is_entry = bool(header[1])
        elif line.startswith("}") and (line.strip() == "}" or line.startswith("}, execution_thread")):
            finish()
            if current.name in waited:
                raise ValueError(f"computation {current.name!r} comes after its use")
            computations[current.name] = current
            if is_entry:
                entry = current
            current = None
        elif _START.match(line):
            finish()
            lines.append(line)
        elif lines:
            lines.append(line)
    if current is not None:
        raise ValueError(f"this text ends within the computation {current.name!r}")
    if entry is None:
        raise ValueError("no ENTRY computation in this text")
    head = text[: text.find("\n")]
    devices = math.prod(int(found[1]) for found in (_PARTITIONS.search(head), _REPLICAS.search(head)) if found)
    return Module(head.split(",")[0].removeprefix("HloModule "), computations, entry, devices, ":T(" in text)


def bytes_of(dtype: str) -> float:
    """Bytes of one number of a dtype as HLO writes it.

    >>> bytes_of("bf16"), bytes_of("f8e4m3fn"), bytes_of("u4")
    (2.0, 1.0, 0.5)
    """
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = _BITS.match(dtype)
    return int(bits[1]) / 8 if bits else 0.0


def groups(instruction: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part in a collective together.

    Args:
      instruction: with `replica_groups` in any of its forms, or `source_target_pairs`, whose groups are rings.
      num_devices: of the program; an empty list of groups means all of them.

    >>> line = "  %g = f32[8]{0} all-gather(%x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}"
    >>> groups(_instruction(line)[0], 4)
    ((0, 2), (1, 3))
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}", text)
    if pairs:
        return _rings([tuple(map(int, _NUMBERS.findall(p))) for p in re.findall(r"\{([^}]*)\}", pairs[1])])
    mesh = _MESH.search(text)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2])
    array = re.search(r"replica_groups=" + _ARRAY.pattern, text)
    if array:
        shape, source = ([int(x) for x in array[i].split(",")] for i in (1, 2))
        order = [int(x) for x in array[3].split(",")] if array[3] else list(range(len(source)))
        flat = _transposed(source, order)
        return tuple(tuple(flat[i : i + shape[-1]]) for i in range(0, len(flat), shape[-1]))
    listed = re.search(r"replica_groups=\{((?:\{[^}]*\},?\s*)*)\}", text)
    found = re.findall(r"\{([^}]*)\}", listed[1]) if listed else []
    return tuple(tuple(map(int, _NUMBERS.findall(g))) for g in found) or (tuple(range(num_devices)),)


def _instruction(line: str) -> tuple[Instruction, bool]:
    start = _START.match(line)
    assert start is not None
    opcode = _OPCODE.search(line, start.end() - 1)
    if opcode is None:
        return Instruction(start[2], "", (), (), line), bool(start[1])
    shapes = tuple(_shape(m) for m in _SHAPE.finditer(line, start.end(), opcode.start()))
    close = _closing(line, opcode.end())
    inside, literal, operands = line[opcode.end() : close], "", ()
    if opcode[1] in ("constant", "parameter"):
        literal = inside
    else:
        operands = tuple(_OPERAND.findall(inside))
    return Instruction(start[2], opcode[1], shapes, operands, line[close + 1 :], literal), bool(start[1])


def _shape(match: re.Match[str]) -> Shape:
    dims = tuple(int(d.strip().lstrip("<=")) for d in match[2].split(",") if d.strip())
    space = _SPACE.search(match[3]) if match[3] else None
    return Shape(match[1], dims, int(space[1]) if space else 0)


def _closing(line: str, begin: int) -> int:
    """Where the parenthesis closes that was opened before `begin`."""
    close = line.find(")", begin)
    depth = line.count("(", begin, close)
    while depth:
        after = line.find(")", close + 1)
        if after < 0:
            return len(line)
        depth += line.count("(", close + 1, after) - 1
        close = after
    return close if close >= 0 else len(line)


def _rings(pairs: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    following = {a: b for a, b in pairs}
    found, seen = [], set()
    # A chain begins where nothing is sent; a ring anywhere.
    for first in [a for a in following if a not in following.values()] + list(following):
        ring, device = [], first
        while device not in seen:
            seen.add(device)
            ring.append(device)
            if device not in following:
                break
            device = following[device]
        if ring:
            found.append(tuple(ring))
    return tuple(found)


def _mesh_groups(axes: str, along: str) -> tuple[tuple[int, ...], ...]:
    """Groups of `mesh['a'=2,'b'=4] {'b'}`: devices are numbered with the last axis fastest; `'b':(2)2` is a part."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    # Each axis falls into the dimensions before, within and after its part.
    shape: list[int] = []
    chosen: list[int] = []
    for name, size in sizes.items():
        parts = [(int(p or 1), int(s or size)) for n, p, s in _GROUP_AXIS.findall(along) if n == name]
        before, within = parts[0] if parts else (size, 1)
        shape += [before, within, size // (before * within)]
        if parts:
            chosen.append(len(shape) - 2)
    others = [i for i in range(len(shape)) if i not in chosen]
    flat = _transposed(shape, others + chosen)
    size = math.prod(shape[i] for i in chosen)
    return tuple(tuple(flat[i : i + size]) for i in range(0, len(flat), size))


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """Numbers from 0 in an array of this shape, in the order of its transpose."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    flat = [0]
    for axis in order:
        flat = [base + i * strides[axis] for base in flat for i in range(shape[axis])]
    return flat
