"""Several machines for one configuration: each planned in turn, and all of them ranked, as one who rents would."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign import __version__
from jaxalign.errors import InputError
from jaxalign.parallel.hardware import Hardware, find_machine
from jaxalign.plan.machines import absent_devices, joined, parse_topology
from jaxalign.plan.plan import plan, require_fit
from jaxalign.plan.predict import OF_THE_RUN, Assumptions, assumptions
from jaxalign.plan.tables import aligned, duration, gib, speed, three_digits, wrapped

_STEPS = 1000  # that are compared, where the steps of the run are not known


class Wanted(NamedTuple):
    """A machine to plan for, and the numbers that are given for it."""

    topology: str
    assume: tuple[str, ...]  # "NAME=VALUE" each


def wanted(on: str, assume: Sequence[str], machines: Mapping[str, Hardware]) -> list[Wanted]:
    """The machines of `--on`, all of them checked: names, numbers, and of several shapes and compilers.

    Args:
      on: names as `jaxalign.plan.machines.parse_topology` takes them, with commas between.
      assume: "NAME=VALUE" for all machines, or "KIND.NAME=VALUE" for those of a kind, which goes before the other.
      machines: kinds that are known.

    Raises:
      InputError: of the first that is wrong.

    >>> from jaxalign.parallel.hardware import read_machines
    >>> wanted("gpu:h100:1x8x1", ["h100.price=2", "price=1"], read_machines())
    [Wanted(topology='gpu:h100:1x8x1', assume=('price=1', 'price=2'))]
    """
    names = [name.strip() for name in on.split(",")]
    kinds = {}
    for name in names:
        with _of_all(names, name):
            kinds[name] = parse_topology(name, machines)[:2]
    if len(kinds) < len(names):
        raise InputError(f"--on={on}: a machine is named twice", "each once", f"--on={','.join(kinds)}")
    for text in assume:
        near = difflib.get_close_matches(of := _kind(text), known := {k for _, k in kinds.values()}, n=1, cutoff=0.0)
        if of and of not in known:
            expected = f"a machine of --on before the point: {', '.join(sorted(known))}"
            raise InputError(f"--assume {text}", expected, f"--assume {near[0]}{text.removeprefix(of)}")
    found = []
    for name, (platform, kind) in kinds.items():
        given = [text for text in assume if not _kind(text)]
        machine = joined(find_machine(kind, platform, machines), name)
        assumptions(machine, given)
        for text in assume:
            if _kind(text) == kind:
                given.append(own := text.removeprefix(f"{kind}."))
                if own.partition("=")[0] in OF_THE_RUN:
                    raise InputError(f"--assume {text}", "one number for all: it is the run's", f"--assume {own}")
                with _of_kind(kind):
                    assumptions(machine, given)
        found.append(Wanted(name, tuple(given)))
    if len(names) > 1:  # of one the plan finds the same at once
        for name in names:
            with _of_all(names, name):
                absent_devices(name, machines)
    return found


def _kind(text: str) -> str:
    """The kind of machine that a number is given for; "" for all."""
    kind, point, _ = text.partition("=")[0].partition(".")
    return kind if point else ""


@contextlib.contextmanager
def _of_all(names: Sequence[str], name: str) -> Iterator[None]:
    """Errors about one machine, the flag that mends it with the names of all."""
    try:
        yield
    except InputError as error:
        if not error.fix.startswith("--on="):
            raise
        mended = error.fix.removeprefix("--on=")
        each_once = dict.fromkeys(mended if each == name else each for each in names if each or not any(names))
        fix = f"--on={','.join(each_once)}"
        raise InputError(error.problem, error.expected, fix, error.places) from None


@contextlib.contextmanager
def _of_kind(kind: str) -> Iterator[None]:
    """Errors about a number of one kind, as it was given."""
    try:
        yield
    except InputError as error:
        problem, fix = (text.replace("--assume ", f"--assume {kind}.") for text in (error.problem, error.fix))
        raise InputError(problem, error.expected, fix) from None


def compare(
    config: Any,
    machines: Mapping[str, Hardware],
    asked: Sequence[Wanted],
    *,
    search: int = 0,
    say: Callable[[str], None] = lambda text: None,
    show: Callable[[dict[str, Any], Assumptions], None] = lambda found, assumed: None,
) -> dict[str, Any]:
    """Plans a configuration for several machines; one that it does not suit does not stop the others.

    Args:
      config: as `jaxalign train` takes it.
      machines: kinds that are known.
      asked: as `wanted` gives them.
      search: see `jaxalign.plan.plan.plan`.
      say: is told of what is being compiled.
      show: is given the plan of each machine when it is made.

    Returns:
      JSON values: `machines` with the plan of each by its name (`problem`, `expected`, `fix` in place of one that
      training would refuse there), `fits` of each, and `ranking`, the best first.

    Raises:
      InputError: what training would refuse on all of them.
    """
    found: dict[str, Any] = {}
    refused: list[InputError] = []
    for one in asked:
        tell = lambda text, name=one.topology: say(f"{name}: {text}")  # noqa: E731
        try:
            made, assumed = plan(config, one.topology, machines=machines, assume=one.assume, search=search, say=tell)
        except InputError as error:
            refused.append(error.within(one.topology))
            found[one.topology] = {"problem": error.found, "expected": error.expected, "fix": error.fix}
            tell(f"not planned: {error.found}")
            continue
        found[one.topology] = made
        show(made, assumed)
    if len(refused) == len(asked):
        raise refused[0]
    return {
        "version": __version__,
        "fits": {name: _fits(made) for name, made in found.items()},
        "ranking": ranking(found),
        "machines": found,
    }


def require_one(found: Mapping[str, Any]) -> None:
    """Refuses a comparison of machines on none of which all stages fit.

    Args:
      found: as `compare` gives it.

    Raises:
      InputError: of the first machine that was planned, as for that one alone.
    """
    if not any(found["fits"].values()):
        name, made = next((name, made) for name, made in found["machines"].items() if "stages" in made)
        if error := _trouble(made):
            raise error.within(name)


def _fits(made: Mapping[str, Any]) -> bool:
    return _trouble(made) is None


def _trouble(made: Mapping[str, Any]) -> InputError | None:
    """Why a machine does not do."""
    if "stages" not in made:
        return InputError(made["problem"], made["expected"], made["fix"])
    try:
        require_fit(made)
    except InputError as error:
        return error
    return None


def ranking(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The machines, those first where all stages fit: by the price of the run, else by its time.

    Args:
      found: plans by the machine's name.

    Returns:
      Of each `machine`, `fits`, `peak` and `pool`; of those that fit `seconds`, `mfu` and `tokens_per_second` of a step
      (null: several stages), and `run`: `steps` (null: those of the run; 1,000 of each stage where they are not known),
      `seconds`, `device_hours`, `price`.
    """
    rows = [_row(name, made) for name, made in found.items()]
    fit = [row for row in rows if row["fits"]]
    key = "price" if all(row["run"]["price"] is not None for row in fit) else "seconds"
    return sorted(fit, key=lambda row: row["run"][key]) + [row for row in rows if not row["fits"]]


def _row(name: str, made: Mapping[str, Any]) -> dict[str, Any]:
    stages = list(made.get("stages", {}).values())
    peaks = [max((p["memory"]["peak"] for p in stage["programs"]), default=None) for stage in stages]
    row: dict[str, Any] = {
        "machine": name,
        "fits": _fits(made),
        "peak": max(peaks) if peaks and None not in peaks else None,  # None: the compiler itself found no room
        "pool": made["machine"]["pool"] if stages else None,
        "seconds": None,
        "mfu": None,
        "tokens_per_second": None,
        "run": None,
    }
    if not row["fits"]:
        return row
    if len(stages) == 1:
        row |= {key: stages[0]["iteration"][key] for key in ("seconds", "mfu", "tokens_per_second")}
    whole, price = made["together"] if len(stages) > 1 else stages[0]["run"], made["assumptions"]["price"]
    known = whole is not None and whole["seconds"] is not None
    seconds = whole["seconds"]["total"] if known else _STEPS * sum(stage["iteration"]["seconds"] for stage in stages)
    hours = seconds * made["machine"]["devices"] / 3600
    row["run"] = {
        "steps": None if known else _STEPS,
        "seconds": seconds,
        "device_hours": hours,
        "price": hours * price if price else None,
    }
    return row


def ranking_text(found: Mapping[str, Any]) -> str:
    """The table that ends a page of several machines.

    Args:
      found: as `compare` gives it.
    """
    rows, plans = found["ranking"], found["machines"]
    fit = [row for row in rows if row["fits"]]
    unpriced = [row["machine"].split(":")[1] for row in fit if row["run"]["price"] is None]
    steps = next((row["run"]["steps"] for row in fit), None)
    run = f"{steps:,} steps" if steps else "the run"
    lines = [f"machines, by the {'time' if unpriced else 'price'} of {run}:" if fit else "machines: it fits none", ""]
    table = [["", "fits", "GiB a device", "a step", "MFU", "tokens/s", run, "device-hours", "price"]]
    for row in rows:
        peak = f"{gib(row['peak'])} of" if row["peak"] else "above"
        peak = f"{peak} {gib(row['pool'])}" if row["pool"] else "-"
        cost = ["-"] * 3
        if row["run"]:
            price = row["run"]["price"]
            cost = [duration(row["run"]["seconds"]), three_digits(row["run"]["device_hours"])]
            cost.append("?" if price is None else f"{price:,.2f}")
        table.append([row["machine"], "yes" if row["fits"] else "NO", peak, *speed(row), *cost])
    several = not any(row["seconds"] for row in rows)
    kept = [i for i, head in enumerate(table[0]) if not (several and head in ("a step", "MFU", "tokens/s"))]
    if len(unpriced) == len(fit):
        kept.pop()
    lines += aligned([[row[i] for i in kept] for row in table], indent="  ")
    told = [f"{name}: {error.found}; {error.fix}" for name, made in plans.items() if (error := _trouble(made))]
    if unpriced:
        flags = " ".join(f"--assume {kind}.price=2" for kind in dict.fromkeys(unpriced))
        told.append(f"by price, with what a device costs you for an hour: {flags}")
    told += _told_apart([plans[row["machine"]] for row in fit])
    return "\n".join([*lines, *(line for each in told for line in wrapped(each, "  "))])


def _told_apart(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """Machines of one peak whose products are assumed to reach different shares of it."""
    shares: dict[float, dict[str, float]] = {}
    for made in plans:
        v = made["assumptions"]
        shares.setdefault(v["flops"], {})[made["machine"]["name"].split(":")[1]] = v["efficiency"]
    return [
        f"{', '.join(f'{kind} {share:g}' for kind, share in of.items())}: shares of the same peak that "
        f"products are assumed to reach; --assume efficiency={min(of.values()):g} compares memory and bandwidth alone"
        for of in shares.values()
        if len(set(of.values())) > 1
    ]
