"""Devices as their makers publish them: one table, `machines.toml`, that a file of one's own adds to."""

from __future__ import annotations

import difflib
import functools
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
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"machines in {file}: {error}", "a TOML file", "[mine] and its fields; see docs/planning.md"
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
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise InputError(f"{file}: [{name}] kinds {kinds!r}", "names of devices", f'kinds = ["{name}"]')
    for field, value in fields.items():
        if field in ("platform", "kinds", "target"):
            continue
        least = 0 if field in ("launch", "latency", "wrap") else 1e-9
        most = 1 if field in ("pool", "efficiency") else 1e30
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            expected = f"a {'share above 0, at most 1' if most == 1 else 'positive number'}: {_MEANT[field]}"
            raise InputError(f"{file}: [{name}] {field} is {value!r}", expected, f"{field} = ...")
    return Hardware(name, **(fields | {"kinds": tuple(kinds)}))
