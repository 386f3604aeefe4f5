"""How long a compiled program takes on a machine, from what it does and from numbers that are assumed.

time = products + traffic + collectives that nothing hides + gaps between kernels

products     the greater of FLOPs / (peak x efficiency) and their bytes / (bandwidth x memory_efficiency)
traffic      bytes of the other kernels / (bandwidth x memory_efficiency)
collectives  bytes that a ring moves / (link x link_efficiency) + latency, by the slowest link that a group crosses;
             of an asynchronous one what the work between its start and its end does not hide; work hides one at a time
gaps         kernels x launch
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.errors import InputError
from jaxalign.parallel.hardware import Hardware
from jaxalign.plan.account import Account, Collective

# Numbers that are assumed, beside those of the machine: name -> (value, what it is).
_ASSUMED: dict[str, tuple[float, str]] = {
    "memory_efficiency": (0.85, "share of the memory's bandwidth that kernels reach"),
    "link_efficiency": (0.8, "share of a link's bandwidth that collectives reach"),
    "attention_efficiency": (0.6, "speed of attention kernels against other products"),
    "float32_speed": (0.5, "speed of products of float32 against bfloat16"),
    "readouts": (1.0, "share of a row's tokens that are read out, where data are not here"),
    "steps": (0.0, "steps of a run, where data are not here and num_train_steps is not set; 0: not known"),
    "price": (0.0, "of one device for an hour; 0: not known"),
}
# Those of the machine, which a flag overrides by the same name.
_OF_MACHINE = {
    "efficiency": "share of the peak that large matrix products reach",
    "pool": "share of a device's memory that programs may use",
    "launch": "seconds between two kernels",
    "latency": "seconds of a collective beside its bytes",
    "link": "bytes/s of one link within a host or slice, in one direction",
    "network": "bytes/s between hosts or slices, of each device",
    "bandwidth": "bytes/s of a device's memory",
    "flops": "peak of dense bfloat16 products, FLOP/s",
}
_SHARES = {"pool", "efficiency", "memory_efficiency", "link_efficiency", "readouts"}
_MAY_BE_ZERO = ("launch", "latency", "steps", "price")
_SUCH_AS = {"steps": 1000, "price": 2}  # in place of a default that says nothing
OF_THE_RUN = ("readouts", "steps")  # the same on every machine


class Assumptions(NamedTuple):
    """The machine's numbers and those that are assumed of any."""

    machine: Hardware
    values: Mapping[str, float]

    def lines(self) -> list[str]:
        """Each number and what it is."""
        said = {**_OF_MACHINE, **{name: words for name, (_, words) in _ASSUMED.items()}}
        return [f"{name}={self.values[name]:.4g}  {words}" for name, words in said.items()]


def assumptions(machine: Hardware, given: Sequence[str] = ()) -> Assumptions:
    """The numbers of a prediction.

    Args:
      machine: from the table.
      given: "NAME=VALUE" each, from flags.

    Raises:
      InputError: a name that there is not, or a value out of its range.

    >>> from jaxalign.parallel.hardware import read_machines
    >>> assumptions(read_machines()["h200"], ["pool=0.9"]).values["pool"]
    0.9
    """
    values = {name: float(getattr(machine, name)) for name in _OF_MACHINE}
    values |= {name: value for name, (value, _) in _ASSUMED.items()}
    for text in given:
        name, equals, value = text.partition("=")
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1, cutoff=0.0)[0]
            raise InputError(f"--assume {text}", f"one of {', '.join(values)}", f"--assume {near}={value or '...'}")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        least = 0.0 if name in _MAY_BE_ZERO else 1e-12
        most = 1.0 if name in _SHARES else 1e30
        if not equals or not least <= number <= most:
            raise InputError(
                f"--assume {text}",
                "a share above 0, at most 1" if name in _SHARES else "a positive number",
                f"--assume {name}={values[name] or _SUCH_AS.get(name, 0):g}",
            )
        values[name] = number
    return Assumptions(machine, values)


class Time(NamedTuple):
    """Seconds of one run of a program."""

    products: float
    traffic: float
    collectives: float  # that nothing hides
    gaps: float
    hidden: float  # of collectives, behind other work; not part of the sum

    @property
    def total(self) -> float:
        """All that takes time."""
        return self.products + self.traffic + self.collectives + self.gaps


class Link(NamedTuple):
    """What a collective's group crosses, and how fast."""

    name: str
    bandwidth: float  # bytes/s of a device, in the direction of a ring


def predict(account: Account, assumed: Assumptions, devices: Sequence[Any]) -> Time:
    """Seconds of one run.

    Args:
      account: what the program does on one device.
      assumed: the machine and the numbers of the prediction.
      devices: in the order of the program's device numbers.
    """
    v = assumed.values
    memory = v["bandwidth"] * v["memory_efficiency"]
    products = sum(p.times * max(p.flops / speed(p, assumed), p.bytes / memory) for p in account.products)
    shown = hidden = 0.0
    for c, seconds, behind in alone_and_hidden(account, assumed, devices):
        shown += c.times * (seconds - behind)
        hidden += c.times * behind
    return Time(products, account.traffic_bytes / memory, shown, account.kernels * v["launch"], hidden)


def speed(product: Any, assumed: Assumptions) -> float:
    """FLOP/s of a product."""
    v = assumed.values
    found = v["flops"] * v["efficiency"]
    if product.what != "dot":
        return found * v["attention_efficiency"]
    wide = any(dtype in ("f32", "f64") for dtype in product.dtypes)
    return found * (v["float32_speed"] if wide else 1.0)


def alone_and_hidden(
    account: Account, assumed: Assumptions, devices: Sequence[Any]
) -> list[tuple[Collective, float, float]]:
    """Each collective, its seconds by itself, and those of them that work between its start and its end hides.

    Work hides one collective at a time: what ends first has the first of it, a later one what is left.
    """
    v, left = assumed.values, {}
    compute, memory = v["flops"] * v["efficiency"], v["bandwidth"] * v["memory_efficiency"]
    found = [(c, collective_seconds(c, assumed, devices), 0.0) for c in account.collectives]
    waiting = [i for i, (c, _, _) in enumerate(found) if c.asynchronous and c.between]
    for i in sorted(waiting, key=lambda i: found[i][0].between[-1].number):
        c, seconds, hidden = found[i]
        for each in c.between:
            free = left.get(each.number, max(each.flops / compute, each.bytes / memory))
            used = min(free, seconds - hidden)
            left[each.number], hidden = free - used, hidden + used
        found[i] = (c, seconds, hidden)
    return found


def collective_seconds(collective: Collective, assumed: Assumptions, devices: Sequence[Any]) -> float:
    """Seconds of one execution, by itself."""
    if collective.group_size < 2:
        return 0.0
    v = assumed.values
    found = min((link(group, assumed, devices) for group in collective.groups[:64]), key=lambda x: x.bandwidth)
    most = v["link"] * collective.rings if collective.rings else found.bandwidth
    return collective.moved / (min(found.bandwidth, most) * v["link_efficiency"]) + v["latency"]


def link(group: Sequence[int], assumed: Assumptions, devices: Sequence[Any]) -> Link:
    """The slowest link that a ring through a group crosses.

    Within a TPU slice the ring runs along all axes of the torus that the group spans, both ways where it spans a whole
    side that is closed. Between hosts or slices there are as many rings as the group has devices in each, every one
    over a network card of its own.

    Args:
      group: numbers of devices.
      assumed: the machine and its numbers.
      devices: in the order of their numbers.
    """
    machine, v = assumed.machine, assumed.values
    own = [devices[i] for i in group if i < len(devices)]
    if machine.platform == "gpu":
        places = Counter(d.id // machine.domain for d in own)
        inside = v["link"]
    else:
        places = Counter(getattr(d, "slice_index", 0) for d in own)
        inside = v["link"] * max(sum(_ways(own, devices, machine.wrap)), 1)
    if len(places) > 1:
        return Link("network", min(inside, min(places.values()) * v["network"]))
    return Link("link", inside)


def _ways(own: Sequence[Any], devices: Sequence[Any], wrap: int) -> list[int]:
    """Of each axis of a torus that a group spans, the ways that its ring has."""
    if not own:
        return []
    ways = []
    beside = [d for d in devices if getattr(d, "slice_index", 0) == getattr(own[0], "slice_index", 0)]
    for axis in range(len(own[0].coords)):
        side, whole = (len({d.coords[axis] for d in some}) for some in (own, beside))
        if side > 1:
            ways.append(2 if wrap and side == whole and whole % wrap == 0 else 1)
    return ways
