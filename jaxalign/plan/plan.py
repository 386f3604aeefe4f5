"""The plan of a configuration for a machine: what each of its programs needs and takes, as numbers."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign import __version__
from jaxalign.config import get
from jaxalign.errors import InputError
from jaxalign.parallel.hardware import Hardware, find_machine, read_machines
from jaxalign.plan.described import plan_stage
from jaxalign.plan.machines import absent_devices, joined, parse_topology
from jaxalign.plan.predict import Assumptions, assumptions
from jaxalign.plan.runs import Length, run_of, together
from jaxalign.plan.search import AS_IS, nearest_that_fits
from jaxalign.plan.search import search as search_stage
from jaxalign.plan.stages import adapter_export, make_stage, stage_configs, starting_from
from jaxalign.plan.tables import gib
from jaxalign.train.compiled import in_words

# Of the numbers in a plan's JSON, by the ends of their names.
UNITS = {
    "seconds": "s; of a program: one run",
    "bytes, memory, pool, peak": "bytes of each device; of a collective: what a device has in full",
    "flops": "FLOP of each device, one run",
    "times": "runs in a step of the data stream (PPO: an iteration)",
    "runs": "runs in the whole run; null: not known",
    "tokens": "of all devices, without padding",
    "mfu": "share of the published peak",
    "device_hours": "devices x hours",
    "price": "device_hours x the assumed price",
}


def plan(
    config: Any,
    topology: str,
    *,
    machines: Mapping[str, Hardware] | None = None,
    assume: Sequence[str] = (),
    search: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], Assumptions]:
    """Compiles what a configuration's stages run, and predicts.

    Args:
      config: as `jaxalign train` takes it.
      topology: the machine, see `jaxalign.plan.machines.parse_topology`.
      machines: kinds that are known; None: those of `machines.toml`.
      assume: "NAME=VALUE" each, in place of the numbers of a prediction.
      search: how many programs a search for meshes and the like compiles, at most; 0: none.
      say: is told of what is being compiled.

    Returns:
      JSON values, which docs/planning.md describes, and the numbers that were assumed.

    Raises:
      InputError: what training would refuse, a machine that is not known, or a compiler that is not installed.
    """
    machines = read_machines() if machines is None else machines
    platform, kind, _, _ = parse_topology(topology, machines)
    assumed = assumptions(joined(find_machine(kind, platform, machines), topology), assume)
    configs = stage_configs(config)
    devices = absent_devices(topology, machines)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # All are read before the first is compiled, which takes minutes: one that training would refuse ends them all.
        made, exports = {}, {}
        first = {get(c, field) for c in configs.values() for field in ("from.model", "from.reward")}
        for name, c in configs.items():
            with _errors_of(name):
                configs[name] = starting_from(c, exports)
                made[name] = make_stage(configs[name], devices, tempfile.mkdtemp(dir=scratch), assumed.values)
                if name in first:
                    directory = os.path.join(scratch, f"export of {name}")
                    if exported := adapter_export(made[name][0], configs[name].workdir, directory):
                        exports[name] = exported
        for name, c in configs.items():
            tell = lambda text, name=name: say(_spelt(f"{name + ': ' if name else ''}{text}", _of(name)))  # noqa: E731
            with _errors_of(name):
                one = _stage(c, devices, assumed, tell, made.pop(name))
                tell(_in_short(one))
                if search:
                    one["search"] = search_stage(c, devices, assumed, search, tell, one)
                if not one["fits"]:
                    searched = [each["lines"] for each in one.get("search", {}).get("found", ())]
                    others = [lines for lines in searched if lines != AS_IS]  # of PPO another program may be too large
                    one["change"] = others[0] if others else nearest_that_fits(c, devices, assumed, one)
            found[name or one["algorithm"]] = _renamed(one, _of(name))
    runs = [stage["run"] for stage in found.values()]
    return {
        "version": __version__,
        "fits": {name: stage["fits"] for name, stage in found.items()},
        "together": together(runs) if len(runs) > 1 else None,
        "machine": _machine(topology, devices, assumed),
        "assumptions": dict(assumed.values),
        "stages": found,
        "units": UNITS,
    }, assumed


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Errors of a stage, with its name and the flags of the whole configuration."""
    try:
        yield
    except InputError as error:
        raise error.within(f"stage {name}" if name else "", _of(name)) from error


def _stage(
    c: Any, devices: list[Any], assumed: Assumptions, tell: Callable[[str], None], made: tuple[Any, list[str]]
) -> dict[str, Any]:
    """The plan of a stage; of one that the compiler itself cannot fit, that it does not fit."""
    try:
        return plan_stage(c, devices, assumed, lambda text: tell(f"compiling {text}"), made)
    except InputError as error:
        if "out of memory" not in error.problem:
            raise
        return {
            "algorithm": c.algorithm.name,
            "fits": False,
            "problem": error.problem,
            "expected": error.expected,
            "run": run_of(Length(None, told=(error.problem,)), [], assumed.values, len(devices)),
            "programs": [],
        }


def _in_short(stage: dict[str, Any]) -> str:
    """What was found of a stage, told before a search goes on for long."""
    if not stage["programs"]:
        return f"does not fit: {stage['problem']}"
    peak, pool = (gib(max(p["memory"][which] for p in stage["programs"])) for which in ("peak", "pool"))
    it = stage["iteration"]
    fits = "fits" if stage["fits"] else "does not fit"
    return f"{fits}: {peak} of {pool} GiB, {it['tokens_per_second']:,.0f} tokens/s, MFU {it['mfu']:.1%}"


def plan_step(config: Any, topology: str) -> dict[str, Any]:
    """The plan of one stage's train step alone, as `plan_stage` gives it.

    Args:
      config: one stage's, whose required fields are set.
      topology: the machine, see `jaxalign.plan.machines.parse_topology`.
    """
    platform, kind, _, _ = parse_topology(topology)
    assumed = assumptions(joined(find_machine(kind, platform), topology))
    return plan_stage(config, absent_devices(topology), assumed, lambda text: None, only="train step")


def require_fit(found: Mapping[str, Any]) -> None:
    """Refuses a plan of which something does not fit, with the nearest that does.

    Args:
      found: as `plan` gives it.

    Raises:
      InputError: of the first stage that does not fit: bytes needed, bytes there.
    """
    for name, stage in found["stages"].items():
        if stage["fits"]:
            continue
        place = f"stage {name}" if len(found["stages"]) > 1 else ""
        if "problem" in stage:
            raise InputError(stage["problem"], stage["expected"], stage["change"], (place,) * bool(place))
        program = max(stage["programs"], key=lambda p: p["memory"]["peak"])
        memory = program["memory"]
        raise InputError(
            f"the {program['name']} needs {in_words(memory['peak'])} of each device",
            f"at most the {in_words(memory['pool'])} that programs may use",
            stage["change"],
            (place,) * bool(place),
        )


def _of(name: str) -> Callable[[str], str]:
    """From the name of a stage's field to its name in the whole configuration."""
    return lambda field: f"{name}.{field}" if name and field not in ("workdir", "seed") else field


def _renamed(value: Any, flags: Callable[[str], str]) -> Any:
    """JSON values, the flags in their texts those of the whole configuration."""
    if isinstance(value, dict):
        return {key: _renamed(each, flags) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, flags) for each in value]
    return _spelt(value, flags) if isinstance(value, str) else value


def _spelt(text: str, flags: Callable[[str], str]) -> str:
    return InputError("", "", text).within("", flags).fix


def _machine(topology: str, devices: list[Any], assumed: Assumptions) -> dict[str, Any]:
    machine, pool = assumed.machine, assumed.values["pool"]
    return {
        "name": topology,
        "kind": devices[0].device_kind,
        "platform": machine.platform,
        "devices": len(devices),
        "memory": machine.memory,
        "pool": int(machine.memory * pool),
    }
