"""AOT compilation of a configuration's train step for a target topology, to see that it compiles and fits.

XLA compiles for a described machine as well as for one that is there; no device is touched. The compilers come with
the extra `plan`. An answer takes the CPU seconds of one compilation and reads no weights, only `config.json`, the
tokenizer and the data.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

import jax

from jaxalign.parallel.hardware import of_kind
from jaxalign.plan.machines import absent_devices

_GIB = 2**30
_COLLECTIVE = re.compile(r"= .*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


class MachinePlan(NamedTuple):
    """What a train step needs of a machine."""

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    memory: dict[str, int]  # bytes on each device: arguments, results, temporary, total
    limit: int | None  # bytes a device has; None where this page does not know its kind
    collectives: dict[str, int]  # by name, as written in the program; those of a scanned layer count once
    compile_seconds: float

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None where the memory of the device is not known.

        >>> MachinePlan("", "", 1, {}, {"total": 2}, 1, {}, 0.0).fits
        False
        """
        return None if self.limit is None else self.memory["total"] <= self.limit

    def __str__(self) -> str:
        there = "unknown" if self.limit is None else f"{self.limit / _GIB:.1f} GiB"
        verdict = {True: "fits", False: "does not fit", None: "memory of the device not known"}[self.fits]
        parts = ", ".join(f"{k} {v / _GIB:.3f}" for k, v in self.memory.items())
        return (
            f"{self.topology}: {self.num_devices} x {self.device_kind}, mesh {self.mesh}: {verdict}\n"
            f"GiB on each device: {parts}; there: {there}\n"
            f"collectives: {self.collectives}; compiled in {self.compile_seconds:.0f} s"
        )


def compile_for(topology: str, config: Any) -> MachinePlan:
    """Compiles the train step that `config` gives, for a machine that need not be there.

    Args:
      topology: such as "tpu:v5p:2x2x4" (16 chips) or "gpu:h200:1x8x1"; see `parse_topology`.
      config: one stage's configuration, made from `jaxalign.config.defaults`; its `mesh` lays out the devices.

    Returns:
      What the step needs.

    Raises:
      InputError: anything wrong in the configuration, or the step does not fit and the compiler says so.
    """
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.sharding import param_shardings
    from jaxalign.train.checkpoints import abstract
    from jaxalign.train.compiled import memory_of, out_of_memory
    from jaxalign.train.dryrun import abstract_batch
    from jaxalign.train.models import fit_length
    from jaxalign.train.rundir import RunDir
    from jaxalign.train.stage import Stage

    config, _ = fit_length(config)
    devices = absent_devices(topology)
    kind = devices[0].device_kind
    there = of_kind(kind)
    limit = None if there is None else there.memory
    mesh = make_mesh(config.mesh, devices)
    with tempfile.TemporaryDirectory() as scratch:
        # Built before the mesh is set: whatever is computed on the way must run on a device that is there.
        stage = Stage(config, mesh, RunDir(scratch))
        frozen = {name: role.abstract() for name, role in stage.program.frozen.items()}
        arguments = (stage.like, abstract(frozen, param_shardings(mesh, frozen)), abstract_batch(stage))
        start = time.monotonic()
        with jax.set_mesh(mesh):
            try:
                executable = stage.step.compile(*arguments)
            except jax.errors.JaxRuntimeError as error:
                if "memory" not in str(error).lower():
                    raise
                raise out_of_memory(f"train step on {topology}", {}, limit, str(error)[:300]) from error
        seconds = time.monotonic() - start
    return MachinePlan(
        topology,
        kind,
        len(devices),
        dict(mesh.shape),
        memory_of(executable),
        limit,
        dict(Counter(_COLLECTIVE.findall(executable.as_text()))),
        seconds,
    )
