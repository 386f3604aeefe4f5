"""`model.remat=auto`: the train step with the fastest rematerialisation policy that fits the devices."""

from __future__ import annotations

from collections.abc import Mapping

from jaxalign.errors import InputError
from jaxalign.parallel.device_memory import device_bytes
from jaxalign.parallel.processes import say
from jaxalign.train.arguments import step_arguments
from jaxalign.train.compiled import in_words
from jaxalign.train.stage import Stage

FASTEST_FIRST = ("dots", "attention", "full")
_SHARE = 0.95  # of a device's memory that a step may take: the rest is lost between arrays


def settle_remat(stage: Stage, limit: int | None, before: Mapping[str, str] | None = None) -> None:
    """Gives a stage with `model.remat=auto` its train step and `stage.remat`; any other stage stays as it is.

    Each policy costs a compilation, and the first that fits is taken.  To be called under the stage's mesh, whose
    devices need not be there.

    Args:
      stage: data, models and compiled steps.
      limit: bytes that programs may use on a device; None where that is not known, as on a CPU: nothing is
        recomputed there.
      before: what `noted` gave when the run began: on the same machine it takes the same policy, or a more sparing one
        if that does not fit any more.

    Raises:
      InputError: not even the most sparing one fits.
    """
    if stage.config.model.remat != "auto":
        return
    if limit is None:
        stage.step, stage.remat = stage.step_with("none"), "none"
        return
    policies: tuple[str, ...] = FASTEST_FIRST
    if before and before == noted(stage) | {"remat": before.get("remat")} and before["remat"] in policies:
        policies = policies[policies.index(before["remat"]) :]
    state, frozen, batch = arguments = step_arguments(stage)
    held = device_bytes((state, () if stage.offload else frozen, batch))
    for policy in policies:
        stage.step, stage.remat = stage.step_with(policy), policy
        try:
            stage.step.compile(*arguments)
        except InputError:  # refused because it cannot fit
            if policy == policies[-1]:
                raise
            continue
        memory = stage.step.memory
        # Arguments that the step does not read, such as PPO's frozen models, are not in its account, and lie there.
        needed = memory.get("total", 0) + max(held - memory.get("arguments", 0), 0)
        if needed <= _SHARE * limit:
            break
    say(f"model.remat=auto: {stage.remat}, {in_words(needed)} of {in_words(limit)} there")


def noted(stage: Stage) -> dict[str, str]:
    """What a run notes of its policy, so that it takes the same when it resumes: `remat`, and of which `machine`."""
    mesh = stage.mesh
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return {"remat": stage.remat, "machine": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {axes}"}
