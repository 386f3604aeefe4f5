"""What one kernel of a compiled program multiplies, and what it reads and writes in the device's memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxalign.plan.hlo import Computation, Instruction, Module, Shape, bytes_of

_HOST = 5  # the memory space of the host
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GEMM_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_BLOCKS = re.compile(r'(block_q|block_kv)(?:_dq|_dkv)?\\?": (\d+)')
_KERNEL = re.compile(r'\bname = "(\w+)"')

# Matmuls of [T, S] numbers in an attention kernel: forward scores and sum; for the gradient of queries scores, those of
# the weights, the sum; for keys and values scores, the two sums, the weights' gradient.
_ATTENTION = (
    (re.compile(r"_forward_kernel|splash_m[hq]a_fwd"), "attention", 2),
    (re.compile(r"_queries_kernel|splash_m[hq]a_dq"), "attention dq", 3),
    (re.compile(r"_keys_kernel|splash_m[hq]a_dkv"), "attention dkv", 4),
)

# What hands on an operand's numbers one by one, so that what is read of it is what is read of the result.
COLLECTIVES = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place: the operand that is written
HANDED_ON = {"bitcast", "convert", "copy", "reshape", "transpose"}


class Multiplied(NamedTuple):
    """One product of a kernel."""

    what: str  # "dot", or "attention" with the gradient's name
    dtypes: tuple[str, ...]
    result_dtype: str
    flops: float
    op_name: str


def target(x: Instruction) -> str:
    """What a custom call calls; "" of another instruction."""
    found = _TARGET.search(x.attributes)
    return found[1] if found else ""


def products(module: Module, computation: Computation, x: Instruction, visible: float) -> Iterator[Multiplied]:
    """The products of an instruction, those of a fusion's computation included.

    Args:
      module: the program.
      computation: where the instruction stands.
      x: the instruction.
      visible: share of all pairs of a query and a key that an attention kernel goes through.
    """
    if x.opcode == "fusion":
        inner = module.computations[x.called("calls")[0]]
        for y in inner.instructions:
            yield from products(module, inner, y, visible)
        return
    flops, what = 0.0, "dot"
    shapes = [computation.by_name[name].shapes for name in x.operands]
    if x.opcode == "dot":
        contracted = [shapes[0][0].dims[i] for i in x.numbers("lhs_contracting_dims")]
        flops = 2.0 * x.shapes[0].size * math.prod(contracted)
    elif x.opcode == "convolution":
        flops = _convolution(x, shapes[0][0], shapes[1][0])
    elif x.opcode == "custom-call" and target(x).startswith(_CUBLAS):
        dims = _GEMM_CONTRACTED.search(x.attributes)
        contracted = [shapes[0][0].dims[int(i)] for i in re.findall(r"\d+", dims[1])] if dims else []
        flops = 2.0 * x.shapes[0].size * math.prod(contracted)
    elif x.opcode == "custom-call":
        what, flops = _attention(x, [s[0] for s in shapes if s], visible)
        queries = [s[0] for s in shapes if s and s[0].dtype not in ("s32", "u32")]
        shapes = [[q] for q in queries[:2]]  # type: ignore[misc]
    if flops:
        dtypes = tuple(s[0].dtype for s in shapes[:2])
        result = next((s.dtype for s in x.shapes if what == "dot" or len(s.dims) > 2), x.shapes[0].dtype)
        yield Multiplied(what, dtypes, result, flops, x.op_name)


def _attention(x: Instruction, shapes: list[Shape], visible: float) -> tuple[str, float]:
    """Name and FLOPs of one of our attention kernels, from its operands; FLOPs 0 of another call."""
    name = target(x)
    if name == "tpu_custom_call":
        kernel = x.name + " " + x.op_name
    elif "triton" in name or "mosaic" in name:
        kernel = " ".join(_KERNEL.findall(x.attributes)) + " " + x.op_name
    else:
        return "", 0.0
    what, matmuls = next(((w, n) for pattern, w, n in _ATTENTION if pattern.search(kernel)), ("", 0))
    queries = [s for s in shapes if s.dtype not in ("s32", "u32") and len(s.dims) >= 3]
    if not matmuls or len(queries) < 2:
        return "", 0.0
    q, k = queries[0], queries[1]
    if name == "tpu_custom_call":
        # [N, rows x T, H]. The first operand lists the blocks of a row: [1, all queries', keys'], or, for the gradient
        # of keys, [1, queries', all keys'].
        lists, blocks = shapes[0].dims, {key: int(n) for key, n in _BLOCKS.findall(x.attributes)}
        keys = lists[-1] * blocks.get("block_kv", 0)
        if what == "attention dkv":
            keys = k.dims[-2] * lists[1] * blocks.get("block_q", 0) // q.dims[-2]
    else:
        keys = k.dims[1]  # [B, S, K, H], and queries [B, T, N, H] or [B, T, K, N / K, H]
    return what, 2.0 * matmuls * q.size * keys * visible


def _convolution(x: Instruction, left: Shape, right: Shape) -> float:
    """FLOPs of a product written as a convolution: what a window reads of the padding is not counted."""
    labels = _LABELS.search(x.attributes)
    if labels is None:
        return 0.0
    window = _WINDOW.search(x.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    into, kernel, out = labels[1], labels[2], labels[3]
    spatial = sorted(c for c in into if c.isdigit())

    def field(name: str, i: int, default: str) -> str:
        return fields[name].split("x")[i] if name in fields else default

    taps = 1
    for i, c in enumerate(spatial):
        low = int(field("pad", i, "0_0").split("_")[0])
        taps *= _taps(
            left.dims[into.index(c)],
            right.dims[kernel.index(c)],
            x.shapes[0].dims[out.index(c)],
            low,
            int(field("stride", i, "1")),
            int(field("lhs_dilate", i, "1")),
            int(field("rhs_dilate", i, "1")),
        )
    batch, features = x.shapes[0].dims[out.index("b")], x.shapes[0].dims[out.index("f")]
    grouped = re.search(r"\bbatch_group_count=(\d+)", x.attributes)
    batches = left.dims[into.index("b")] // int(grouped[1]) if grouped else batch
    return 2.0 * batches * features * right.dims[kernel.index("i")] * taps


def _taps(size: int, window: int, out: int, low: int, stride: int, dilate: int, dilate_window: int) -> int:
    """Pairs of a place of the window and of the result that meet a number of the operand, along one dimension."""
    if window == 1 and low == 0 and dilate == 1:
        return out
    last, count = (size - 1) * dilate, 0
    for k in range(window):
        at = k * dilate_window - low  # result o reads at + o * stride
        first = max(0, -(at // stride))
        final = min(out - 1, (last - at) // stride)
        if dilate == 1:
            count += max(0, final - first + 1)
        else:
            count += sum((at + o * stride) % dilate == 0 for o in range(first, final + 1))
    return count


def in_memory(module: Module, shape: Shape, host: bool = False) -> int:
    """Bytes of a shape that lie in the device's main memory, or in the host's: layouts name other memories."""
    if host or shape.space == _HOST:
        return shape.bytes if host and shape.space == _HOST else 0
    return 0 if module.tiled and shape.space else shape.bytes


def traffic(module: Module, computation: Computation, x: Instruction, host: bool = False) -> int:
    """Bytes that a kernel reads from and writes to memory: its operands and results, of sliced operands the slices, of
    a result that updates an operand in place the update.

    Args:
      module: the program.
      computation: where the instruction stands.
      x: the instruction.
      host: of the host's memory, not the device's.
    """
    numbers = range(len(x.operands))
    return sum(read(module, computation, x, n, host) for n in numbers) + _written(module, computation, x, host)


def read(module: Module, computation: Computation, x: Instruction, number: int, host: bool = False) -> int:
    """Bytes that a kernel reads of one operand; arguments as `traffic`."""
    shapes = computation.by_name[x.operands[number]].shapes
    found = sum(in_memory(module, s, host) for s in shapes)
    if x.opcode == "fusion" and len(shapes) == 1 and found:
        inner = module.computations[x.called("calls")[0]]
        return min(found, _read_of(module, inner, inner.parameters[number], shapes[0]))
    if x.opcode in _SLICES and number == 0:
        return min(found, x.bytes)
    return 0 if x.opcode in _UPDATES and number == 0 else found


def _read_of(module: Module, inner: Computation, name: str, shape: Shape) -> int:
    """Bytes that a fusion reads of one parameter."""
    nested, numbers, pending, seen = 0, 0, [name], {name}
    while pending:
        y = pending.pop()
        users = inner.users.get(y, [])
        if y == inner.root and y != name:
            return shape.bytes
        for user in users:
            if user.opcode in _SLICES and user.operands[0] == y:
                numbers += user.shapes[0].size
            elif user.opcode in _UPDATES and user.operands[0] == y:
                continue  # in place
            elif y == name and ((user.name == inner.root and user.opcode == "tuple") or user.opcode in COLLECTIVES):
                continue  # handed on as it came, or a collective's
            elif user.opcode == "fusion":  # a TPU's within another
                own = module.computations[user.called("calls")[0]]
                given = [own.parameters[i] for i, operand in enumerate(user.operands) if operand == y]
                nested += sum(_read_of(module, own, each, shape) for each in given)
            elif user.opcode in HANDED_ON or (user.opcode == "pad" and user.operands[0] == y):
                if user.name not in seen:
                    seen.add(user.name)
                    pending.append(user.name)
            else:
                return shape.bytes
    return min(nested + math.ceil(numbers * bytes_of(shape.dtype)), shape.bytes)


def _written(module: Module, computation: Computation, x: Instruction, host: bool) -> int:
    if x.opcode == "copy-start":  # (result, operand, what awaits it)
        return in_memory(module, x.shapes[0], host)
    inner, roots, handed = computation, [x] * len(x.shapes), False
    if x.opcode == "fusion":
        inner = module.computations[x.called("calls")[0]]
        root = inner.by_name[inner.root]
        handed = root.opcode == "tuple"
        roots = [inner.by_name[name] for name in root.operands] if handed else [root]
    total = 0
    for shape, y in zip(x.shapes, roots, strict=False):
        while y.opcode in HANDED_ON and inner is not computation:
            y = inner.by_name[y.operands[0]]
        size = in_memory(module, shape, host)
        if (y.opcode == "parameter" and handed) or y.opcode in COLLECTIVES:
            continue
        if y.opcode in _UPDATES:
            part = inner.by_name[y.operands[_UPDATES[y.opcode]]].shapes[0].size
            # Where numbers are added to those that are there, these are read.
            size = min(size, math.ceil(part * bytes_of(shape.dtype)) * (2 if y.opcode == "scatter" else 1))
        total += size
    return total
