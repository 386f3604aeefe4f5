"""Devices as their makers publish them: one table, `machines.toml`, that a file of one's own adds to."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import InputError

_TABLE = Path(__file__).with_name("machines.toml")
# What the fields of an entry are, for messages; `machines.toml` says it at length.
_MEANT = {
    "kinds": "starts of the device's name as JAX gives it",
    "platform": "gpu or tpu",
    "flops": "dense bfloat16 FLOP/s",
    "memory": "bytes, as the driver reports them",
    "pool": "share of the memory that programs may use",
    "bandwidth": "bytes/s of the memory",
    "link": "bytes/s in one direction within a host or slice",
    "domain": "GPUs that the link joins",
    "axes": "axes of a TPU's torus",
    "wrap": "a side that it divides is a ring",
    "network": "bytes/s in one direction between hosts or slices, for each device",
    "launch": "seconds between two kernels",
    "latency": "seconds of a collective beside its bytes",
    "efficiency": "share of flops that large matrix products reach",
    "target": "what XLA wants to know of a GPU",
}
_TARGET = ("capability", "cores", "fpus", "threads", "shared", "shared_block", "l2", "clock")
# What a field may be at most (others 1e30), which are whole numbers, and which may be 0.
_MOST = {"pool": 1, "efficiency": 1, "axes": 3, "memory": 1e18, "bandwidth": 1e18, "domain": 1 << 20, "wrap": 1 << 20}
_WHOLE = ("memory", "domain", "axes", "wrap")
_MAY_BE_ZERO = ("launch", "latency", "wrap")


class Hardware(NamedTuple):
    """One kind of device; `machines.toml` says what each number is."""

    name: str
    kinds: tuple[str, ...]
    flops: float
    platform: str = ""  # "gpu" or "tpu"; "": known for its MFU alone
    memory: int = 0
    pool: float = 1.0
    bandwidth: float = 0.0
    link: float = 0.0
    domain: int = 1
    axes: int = 0
    wrap: int = 0
    network: float = 0.0
    launch: float = 0.0
    latency: float = 0.0
    efficiency: float = 1.0
    target: Mapping[str, Any] | None = None  # of a GPU, for XLA


def read_machines(file: str | Path | None = None) -> dict[str, Hardware]:
    """The table of devices by name.

    Args:
      file: of one's own, in the form of `machines.toml`: it adds entries, or numbers to those that are there.

    Raises:
      InputError: a file that is none, an unknown or a missing field, or a number that is none.

    >>> read_machines()["h200"].flops
    989000000000000.0
    """
    table = _parsed(_TABLE)
    if file is not None:
        for name, entry in _parsed(Path(file).expanduser()).items():
            if not isinstance(entry, Mapping):
                raise InputError(f"{file}: {name} stands outside of a machine", "[NAME] before its fields", "[mine]")
            table[name] = {**table.get(name, {}), **entry}
    return {name: _hardware(name, entry, file or _TABLE) for name, entry in table.items()}


def find_machine(name: str, platform: str, machines: Mapping[str, Hardware] | None = None) -> Hardware:
    """The device of a name, which can be planned for.

    Raises:
      InputError: no such machine, with the nearest name.

    >>> find_machine("h100", "gpu").kinds[0]
    'NVIDIA H100 80GB HBM3'
    """
    machines = read_machines() if machines is None else machines
    found = machines.get(name)
    if found is not None and found.platform == platform:
        return found
    names = [f"{m.platform}:{n}" for n, m in machines.items() if m.platform]
    near = difflib.get_close_matches(f"{platform}:{name}", names, n=1, cutoff=0.0)[0]
    shape = "1x8x1" if near.startswith("gpu") else "2x2" if "e" in near else "2x2x2"
    raise InputError(
        f"machine {platform}:{name}, which is not known",
        f"one of {', '.join(names)}, or an entry of a file of your own (--machines=FILE)",
        f"--on={near}:{shape}",
    )


@functools.lru_cache(maxsize=1)
def _kinds() -> tuple[tuple[str, Hardware], ...]:
    found = [(kind, machine) for machine in read_machines().values() for kind in machine.kinds]
    return tuple(sorted(found, key=lambda pair: -len(pair[0])))


def of_kind(device_kind: str) -> Hardware | None:
    """The entry of a device that is there, by its `device_kind`; None for one that is not in the table (a CPU).

    >>> of_kind("TPU v5 lite").name, of_kind("TPU v5").name, of_kind("NVIDIA L40S").name, of_kind("cpu")
    ('v5e', 'v5p', 'l40s', None)
    """
    return next((machine for kind, machine in _kinds() if device_kind.startswith(kind)), None)


def _parsed(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file() and file.exists():  # a pipe would be waited for, a device has no end
            raise OSError(0, "is no file")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError
        words = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"machines in {file}: {words}", "a TOML file", "[mine] and its fields; see docs/planning.md"
        ) from None


def _hardware(name: str, entry: Mapping[str, Any], file: Any) -> Hardware:
    fields: dict[str, Any] = dict(entry)
    required = ["kinds", "flops"]
    if fields.get("platform") not in (None, "gpu", "tpu"):
        raise InputError(f"{file}: [{name}] platform {fields['platform']!r}", "gpu or tpu", 'platform = "gpu"')
    if fields.get("platform"):
        required += ["memory", "bandwidth", "link", "network"]
        required += ["target"] if fields["platform"] == "gpu" else ["axes"]
    unknown, missing = sorted(fields.keys() - set(Hardware._fields[1:])), [f for f in required if f not in fields]
    target = fields.get("target")
    if target is not None:
        missing += [f"target.{f}" for f in _TARGET if not isinstance(target, Mapping) or f not in target]
    if unknown or missing:
        near = difflib.get_close_matches((unknown or missing)[0], Hardware._fields[1:], n=1, cutoff=0.0)[0]
        field = near if unknown else missing[0]
        raise InputError(
            f"{file}: [{name}] has " + (f"the field {unknown[0]!r}" if unknown else f"no {field}"),
            f"the fields {', '.join(Hardware._fields[1:])}" if unknown else f"all of {', '.join(required)}",
            f"{field} = ...  # {_MEANT[field.partition('.')[0]]}",
        )
    kinds = fields["kinds"]
    if not isinstance(kinds, list) or not kinds or not all(map(_is_kind, kinds)):
        raise InputError(f"{file}: [{name}] kinds {kinds!r}", "names of devices", f'kinds = ["{name}"]')
    for field, value in fields.items():
        if field in ("platform", "kinds", "target"):
            continue
        fields[field] = _number(
            f"{file}: [{name}] {field}", field, value, _MOST.get(field, 1e30), field in _WHOLE, field in _MAY_BE_ZERO
        )
    if target is not None:
        fields["target"] = _target(f"{file}: [{name}] target", target)
    return Hardware(name, **(fields | {"kinds": tuple(kinds)}))


def _is_kind(kind: Any) -> bool:
    """Whether a name can be that of a device, and be quoted for a compiler."""
    return isinstance(kind, str) and bool(kind.strip()) and kind.isprintable() and not set(kind) & set('"\\')


def _number(what: str, field: str, value: Any, most: float, whole: bool, zero: bool = False) -> float:
    """A number of a device, whole ones as `int`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and (0 if zero else 1e-12) <= value <= most
    if not good or (whole and value != int(value)):
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:60]}..."
        kind = "a whole number" if whole else "a number"
        above, near = "of 0 and more" if zero else "above 0", min(most, 8 if most <= 1 << 20 else 1e9)
        meant = f": {_MEANT[field]}" if field in _MEANT else ""
        raise InputError(f"{what} is {shown}", f"{kind} {above}, at most {most:g}{meant}", f"{field} = {near:g}")
    return int(value) if whole else value


def _target(what: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """What XLA wants to know of a GPU, checked."""
    if more := sorted(target.keys() - set(_TARGET)):
        near = difflib.get_close_matches(more[0], _TARGET, n=1, cutoff=0.0)[0]
        raise InputError(f"{what} has {more[0]!r}", f"the fields {', '.join(_TARGET)}", f"{near} = ...")
    capability = target["capability"]
    if not isinstance(capability, (str, float)) or not re.fullmatch(r"[1-9][0-9]?\.[0-9]", str(capability)):
        raise InputError(f"{what}: capability is {capability!r}", "as the maker writes it", 'capability = "9.0"')
    numbers = {part: _number(f"{what}: {part}", part, target[part], 2**31 - 1, part != "clock") for part in _TARGET[1:]}
    return {"capability": str(capability), **numbers}
