"""How often a stage's programs run from its first step to its last, and how long all of it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.plan.assumed import AssumedData


class Length(NamedTuple):
    """How much of its data a stage goes through; None where that hangs on data that are not here."""

    steps: int | None  # batches of the data stream
    evaluations: int | None = 0
    held_out: int | None = 0  # batches of an evaluation
    reference: int | None = 0  # batches that the reference is asked for, once
    told: tuple[str, ...] = ()  # what is not counted, and why


def length_of(stage: Any, steps: int = 0) -> Length:
    """What training would go through.

    Args:
      stage: as `jaxalign.plan.stages.make_stage` gives it.
      steps: of the run, where the data that would say so are not here; 0: not known.
    """
    c, told = stage.config, []
    stands_in = isinstance(stage.dataset, AssumedData)
    epoch: int | None = None if stands_in else stage.dataset.batches_per_epoch
    count: int | None = stage.num_steps
    if stands_in and c.num_train_steps is None:
        count = steps or None
        epoch = -(-steps // c.num_epochs) if steps else None
        if count is None:
            told.append("the number of steps is not known, the data are not here: --assume steps=N")
    elif steps:
        told.append(f"steps={steps:,} is not used: the run has {count:,} steps by its config and data")
    held_out = _held_out(stage, epoch)
    if held_out is None and count is not None:
        told.append("evaluations are not counted, the held-out data are not here: --config.eval.num_batches=N")
    reference = _reference(stage, epoch)
    if reference is None and count is not None:
        told.append("the reference's pass over the data is not counted: they are not here")
    return Length(count, evaluations(c, count) if held_out else held_out, held_out, reference, tuple(told))


def evaluations(config: Any, steps: int | None) -> int | None:
    """Evaluations of a run of so many steps, that of the last step among them.

    >>> from jaxalign.config import defaults
    >>> c = defaults("sft")
    >>> c.eval.every, c.checkpoint.every = 200, 300
    >>> evaluations(c, 1000), evaluations(c, 1001), evaluations(defaults("sft"), 1000)
    (5, 6, 1)
    """
    if not steps:
        return None
    every = [config.eval.every] if config.eval.every else []
    if config.checkpoint.best_metric and config.checkpoint.every:  # each checkpoint is measured
        every.append(config.checkpoint.every)
    last = not any(steps % n == 0 for n in every)
    both = steps // math.lcm(*every) if len(every) > 1 else 0
    return sum(steps // n for n in every) - both + last


def _held_out(stage: Any, epoch: int | None) -> int | None:
    """Batches of an evaluation."""
    c, data = stage.config, stage.eval_dataset
    if data is None:
        return 0
    most = c.eval.num_batches
    if not isinstance(data, AssumedData):
        return min(most or data.batches_per_epoch, data.batches_per_epoch)
    share = c.data.eval_fraction
    if epoch and share and not c.data.eval_sources:
        here = max(math.ceil(epoch * share / (1 - share)), 1)
        return min(most or here, here)
    return most


def _reference(stage: Any, epoch: int | None) -> int | None:
    """Batches of all data, where log-probs of the reference are computed ahead."""
    if stage.program.reference is None:
        return 0
    held_out, share = 0, stage.config.data.eval_fraction
    if stage.eval_dataset is not None:
        if not isinstance(stage.eval_dataset, AssumedData):
            held_out = stage.eval_dataset.batches_per_epoch
        elif stage.config.data.eval_sources:
            return None
        else:
            held_out = math.ceil((epoch or 0) * share / (1 - share))
    return None if epoch is None else epoch + held_out


def run_of(length: Length, programs: list[dict[str, Any]], values: Mapping[str, float], devices: int) -> dict[str, Any]:
    """The whole run in seconds; each program is given its `runs` of the run, None where they are not known.

    Args:
      length: of the run.
      programs: as `jaxalign.plan.described` describes them.
      values: the numbers of the prediction, `price` among them.
      devices: how many.
    """
    measured = None if length.evaluations is None or length.held_out is None else length.evaluations * length.held_out
    once = {"evaluation step": measured, "reference pass": length.reference}
    sampled = not any(p["name"] == "evaluation step" for p in programs)  # PPO samples for an evaluation as for a step
    seconds = {"steps": 0.0, "evaluations": 0.0, "reference pass": 0.0}
    for p in programs:
        total, name = p["seconds"]["total"], p["name"]
        if name in once:
            p["runs"] = once[name]
            seconds["evaluations" if name == "evaluation step" else name] += total * (once[name] or 0)
            continue
        more = (measured or 0) if sampled and name != "train step" else 0
        p["runs"] = None if length.steps is None else p["times"] * (length.steps + more)
        seconds["steps"] += total * p["times"] * (length.steps or 0)
        seconds["evaluations"] += total * p["times"] * more
    whole = None if length.steps is None else sum(seconds.values())
    hours = None if whole is None else whole * devices / 3600
    return {
        "steps": length.steps,
        "evaluations": length.evaluations,
        "evaluation_batches": length.held_out,
        "reference_batches": length.reference,
        "seconds": None if whole is None else seconds | {"total": whole},
        "device_hours": hours,
        "price": hours * values["price"] if hours is not None and values.get("price") else None,
        "not_counted": list(length.told),
    }


def together(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds, device-hours and price of several stages, one after the other; None where one's are not known."""
    if not runs or any(run["seconds"] is None for run in runs):
        return None
    prices = [run["price"] for run in runs]
    return {
        "seconds": {"total": sum(run["seconds"]["total"] for run in runs)},
        "device_hours": sum(run["device_hours"] for run in runs),
        "price": None if None in prices else sum(prices),
    }
