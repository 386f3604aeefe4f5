"""safetensors files read by header and memory map, written tensor by tensor: never a whole file in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from jaxalign.errors import InputError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # as the safetensors library
MAX_BYTES = 5 * 10**9  # of one file: what the hub and older loaders are used to
PRODUCER = "jaxalign"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor is stored."""

    file: Path
    dtype: str  # the file's own code, "F32" and so on
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read(self) -> np.ndarray:
        """A read-only map of it; its pages leave memory when the array does."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        data = np.memmap(self.file, np.uint8, "r", self.offset, math.prod(self.shape) * DTYPES[self.dtype].itemsize)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


# Exponent bits, all set in NaN and infinity alone.
_EXPONENTS: Mapping[np.dtype, tuple[type, int]] = {
    DTYPES["F64"]: (np.uint64, 0x7FF0_0000_0000_0000),
    DTYPES["F32"]: (np.uint32, 0x7F80_0000),
    DTYPES["F16"]: (np.uint16, 0x7C00),
    DTYPES["BF16"]: (np.uint16, 0x7F80),
}
_CHUNK = 1 << 16  # numbers looked at in one go: they fit a core's cache


def all_finite(array: np.ndarray) -> bool:
    """Whether every number is one: neither NaN nor infinite; by bits, faster than the additions of one step.

    Args:
      array: contiguous, of a type in `DTYPES`.
    """
    kind, exponent = _EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(kind)
    largest = kind(exponent)
    return all(int((bits[start : start + _CHUNK] & largest).max()) < exponent for start in range(0, bits.size, _CHUNK))


def list_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, single file or sharded, by name; only headers are read.

    Raises:
      InputError: no safetensors there, a file missing or cut short, a name twice, or an index that says otherwise.
    """
    index = directory / _INDEX
    if (directory / _NAME).is_file():
        files, where = [directory / _NAME], None
    elif index.is_file():
        where = _weight_map(index)
        files = sorted({directory / name for name in where.values()})
    else:
        others = sorted(p.name for p in directory.glob("*.bin"))
        convert = "convert it once: transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        raise InputError(
            f"{', '.join(others[:4]) or 'no weights'} in {directory}",
            f"{_NAME}, or {_INDEX} and its shards",
            convert if others else "copy or download the weights into it, or --config.model.from_scratch=True",
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"no {file.name} in {directory}", f"the shards that {_INDEX} names", "download it again")
        for name, tensor in list_file(file).items():
            if name in tensors:
                raise InputError(
                    f"{name} in both {tensors[name].file.name} and {file.name}", "each tensor once", "download it again"
                )
            if where is not None and where.get(name) != file.name:
                raise InputError(
                    f"{name} in {file.name}", f"{_INDEX} to say so; it says {where.get(name)}", "download it again"
                )
            tensors[name] = tensor
    for name in where or ():
        if name not in tensors:
            raise InputError(f"no {name} in {where[name]}", f"what {_INDEX} says", "download it again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) and file == Path(file).name for file in where.values()):
            return where
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise InputError(
        f"{index} is not an index of weights",
        '{"weight_map": {"tensor": "file beside it", ...}}',
        "download it again; in a git clone, git lfs pull",
    )


def producer_of(file: IO[bytes], name: str) -> str | None:
    """The program that wrote an open file, as far as its header says."""
    try:
        return _raw_header(file, name)[0].get("__metadata__", {}).get("producer")
    except InputError:
        return None


def _raw_header(f: IO[bytes], file: str | Path) -> tuple[dict[str, Any], int]:
    """A file's header and its length in bytes. Source: https://huggingface.co/docs/safetensors, "Format"."""
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
    if length > min(size - 8, _MAX_HEADER):
        raise InputError(
            f"{file} is not a whole safetensors file",
            "a header in its first bytes",
            "download it again; in a git clone, git lfs pull",
        )
    unreadable = InputError(f"{file} has an unreadable header", "a safetensors file", "download it again")
    try:
        header = json.loads(f.read(length), object_pairs_hook=lambda pairs: _no_duplicates(pairs, file))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise unreadable from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise unreadable
    return header, length


def list_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name; only its header is read.

    Raises:
      InputError: not a whole safetensors file.
    """
    with open(file, "rb") as f:
        header, length = _raw_header(f, file)
    header.pop("__metadata__", None)
    size, tensors = file.stat().st_size, {}
    for name, entry in header.items():
        try:
            begin, end = map(operator.index, entry["data_offsets"])
            dtype, shape = str(entry["dtype"]), tuple(map(operator.index, entry["shape"]))
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{name} in {file} without type, shape or place", "a safetensors file", "download it again"
            ) from error
        if begin < 0 or begin > end or min(shape, default=0) < 0:
            raise InputError(
                f"{name} of shape {shape} at bytes {begin} to {end} of {file}",
                "a place and a shape",
                "download it again",
            )
        if 8 + length + end > size:
            raise InputError(f"{file} is cut short at {name}", f"{8 + length + end} bytes or more", "download it again")
        if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise InputError(
                f"{name} {shape} {dtype} in {end - begin} bytes of {file}", "its size", "download it again"
            )
        tensors[name] = Tensor(file, dtype, shape, 8 + length + begin, end - begin)
    _check_places(file, tensors, 8 + length, size)
    return tensors


def _check_places(file: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Tensors are contiguous up to the end of the file, as the format says: else some would overlap."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != start:
            raise InputError(
                f"{name} of {file} begins at byte {tensor.offset}, where the tensor before it ends at {start}",
                "tensors one behind the other",
                "download it again",
            )
        start += tensor.num_bytes
    if start != size:
        raise InputError(f"{file} has {size} bytes, its tensors end at {start}", "no others", "download it again")


def _no_duplicates(pairs: list[tuple[str, Any]], file: str | Path) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice} twice in {file}", "each tensor once", "download it again")
    return dict(pairs)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written: made only when its turn comes."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_tensors(directory: Path | None, tensors: Mapping[str, Planned], dtype: np.dtype, max_bytes: int) -> None:
    """Writes one file, or shards of at most `max_bytes` and their index, in the order given.

    Args:
      directory: where; None to make every tensor and write nothing (the other processes of a multi-host run: making a
        tensor gathers it from all of them).
      tensors: by name.
      dtype: of all of them in the file.
      max_bytes: of one file; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, planned in tensors.items():
        size = math.prod(planned.shape) * dtype.itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    files = [
        _NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, names in zip(files, shards, strict=True):
        write_file(None if directory is None else directory / file, {n: tensors[n] for n in names}, dtype)
    if directory is not None and len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path | None, tensors: Mapping[str, Planned], dtype: np.dtype) -> None:
    """Writes one file, as `write_tensors` does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": PRODUCER}}  # transformers wants the format
    end = 0
    for name, planned in tensors.items():
        begin, end = end, end + math.prod(planned.shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(file or os.devnull, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, planned in tensors.items():
            array = planned.make()
            if array.shape != planned.shape:
                raise ValueError(f"{name} was planned as {planned.shape} and made as {array.shape}")
            if file is not None:
                array = np.ascontiguousarray(array, dtype)
                f.write(array.reshape(-1).view(np.uint8).data)
        if file is not None:
            f.flush()
            os.fsync(f.fileno())
