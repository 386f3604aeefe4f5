"""The plan of a configuration for a machine: what each of its programs needs and takes, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.errors import InputError
from jaxalign.parallel.hardware import Hardware, find_machine, read_machines
from jaxalign.plan.described import plan_stage
from jaxalign.plan.machines import absent_devices, joined, parse_topology
from jaxalign.plan.predict import Assumptions, assumptions
from jaxalign.plan.search import nearest_that_fits
from jaxalign.plan.search import search as search_stage
from jaxalign.plan.stages import stage_configs


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
      JSON values and the numbers that were assumed. The former: `machine`, `assumptions`, and `stages`, by name, each
      with its `programs`, its `iteration`, its `losses`; `search` where one was asked for; `change`, lines of the
      configuration, where something does not fit.

    Raises:
      InputError: what training would refuse, a machine that is not known, a compiler that is not installed, or a
        program that the compiler itself cannot fit.
    """
    machines = read_machines() if machines is None else machines
    platform, kind, _, _ = parse_topology(topology, machines)
    assumed = assumptions(joined(find_machine(kind, platform, machines), topology), assume)
    configs = stage_configs(config)
    devices = absent_devices(topology, machines)
    found: dict[str, Any] = {}
    for name, c in configs.items():
        place = f"stage {name}" if name else ""
        try:
            tell = lambda text, name=name: say(f"compiling {name + ': ' if name else ''}{text}")  # noqa: E731
            found[name] = plan_stage(c, devices, assumed, tell)
            if search:
                found[name]["search"] = search_stage(c, devices, assumed, search, say)
            if not all(p["fits"] for p in found[name]["programs"]):
                found[name]["change"] = nearest_that_fits(c, devices, assumed, found[name])
        except InputError as error:
            if "out of memory" in error.problem:
                near = nearest_that_fits(c, devices, assumed, {})
                raise InputError(error.problem, error.expected, near).within(place, _of(name)) from error
            raise error.within(place, _of(name)) from error
    return {
        "machine": _machine(topology, devices, assumed),
        "assumptions": dict(assumed.values),
        "stages": found,
    }, assumed


def plan_step(config: Any, topology: str) -> dict[str, Any]:
    """The plan of one stage's train step alone, as `plan_stage` gives it.

    Args:
      config: one stage's, whose required fields are set.
      topology: the machine, see `jaxalign.plan.machines.parse_topology`.
    """
    platform, kind, _, _ = parse_topology(topology)
    assumed = assumptions(joined(find_machine(kind, platform), topology))
    return plan_stage(config, absent_devices(topology), assumed, lambda text: None, only="train step")


def require_fit(found: dict[str, Any]) -> None:
    """Refuses a plan of which something does not fit, with the nearest that does.

    Args:
      found: as `plan` gives it.

    Raises:
      InputError: the first program that does not fit: bytes needed, bytes there.
    """
    for name, stage in found["stages"].items():
        for program in stage["programs"]:
            memory = program["memory"]
            if not program["fits"]:
                raise InputError(
                    f"the {program['name']} needs {memory['peak'] / 2**30:.2f} GiB of each device",
                    f"at most the {memory['pool'] / 2**30:.2f} GiB that programs may use",
                    stage["change"],
                ).within(f"stage {name}" if name else "", _of(name))


def _of(name: str) -> Callable[[str], str]:
    """From the name of a stage's field to its name in the whole configuration."""
    return lambda field: f"{name}.{field}" if name else field


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
