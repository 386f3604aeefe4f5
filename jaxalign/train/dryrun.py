"""A dry run: data report, three rows with their loss masks, memory. Nothing is trained, no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.promises import check_layout
from jaxalign.data.report import as_text
from jaxalign.parallel.device_memory import device_bytes, device_limit, num_bytes
from jaxalign.parallel.processes import is_main
from jaxalign.parallel.sharding import batch_part
from jaxalign.train.arguments import step_arguments
from jaxalign.train.best import check_best_metric, rarely
from jaxalign.train.compiled import in_words
from jaxalign.train.models import bytes_by_role
from jaxalign.train.room import check_room
from jaxalign.train.samples import masked_text
from jaxalign.train.stage import Stage, stage_warnings

_ROLES = {0: "chosen", 1: "rejected", 2: "completion"}


def report(stage: Stage, told: Sequence[str] = ()) -> dict[str, Any]:
    """Prints figures of the data, three rows decoded with their masks, the memory of a training step, and what the
    there is to warn of, last.  The whole report goes to `data_report.json`, unless a run has written its own there.

    Args:
      stage: data, models and compiled steps.
      told: warnings about its configuration; they stand with the others.

    Returns:
      `data`, `rows` (text), `steps`, `memory` (bytes a device, by the compiler's account), `model_bytes`,
      `sampling` (text), `warnings`.

    Raises:
      InputError: the step does not fit, with bytes needed and there.
    """
    say = print if is_main() else (lambda *_: None)
    c = stage.config
    check_best_metric(stage)
    data = stage.dataset.report
    say("data:")
    say(as_lines(data))
    check_layout(stage.dataset.batch(0, *batch_part(stage.mesh)).rows)
    rows = show_rows(stage.dataset, stage.tokenizer)
    say("\nrows, what is trained on in ⟦brackets⟧:")
    for row in rows:
        say(row)
    state, frozen, batch = step_arguments(stage)
    sizes = bytes_by_role(state.params, frozen) | {"optimizer": num_bytes(state.opt)}
    say("\nmemory:")
    say("  " + ", ".join(f"{name} {in_words(size)}" for name, size in sizes.items()))
    stage.step.compile(state, frozen, batch)
    memory, limit = stage.step.memory, device_limit()
    if memory:
        there = f" of {in_words(limit)} there" if limit else ""
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in memory.items() if name != "total")
        say(f"  a training step needs {in_words(memory['total'])} on each device{there}: {parts}")
    if stage.remat:
        say(f"  model.remat=auto: {stage.remat}")
    rollout = sampling(stage, frozen)
    if rollout:
        say(f"  {rollout}")
    room = check_room(stage)
    updates = stage.num_steps * stage.program.updates
    say(f"\n{_counted(stage.num_steps, 'step')} of {_counted(c.batch_size, 'row')}, {_counted(updates, 'update')}")
    warnings = [*told, *room, *rarely(stage), *stage_warnings(stage)]
    for warning in warnings:
        say(f"warning: {warning}")
    if stage.directory.untrained():
        stage.write_report()
        say(f"the whole data report: {stage.directory.path / 'data_report.json'}")
    return {
        "data": data,
        "rows": rows,
        "steps": stage.num_steps,
        "memory": memory,
        "model_bytes": sizes,
        "sampling": rollout,
        "warnings": warnings,
    }


def sampling(stage: Stage, frozen: Any) -> str:
    """How the weights lie while completions are sampled, why, and what of it is on each device; "" without a rollout.

    Args:
      stage: of any algorithm.
      frozen: shapes of the frozen parameters by role.
    """
    collector = getattr(stage.program.prepare, "collector", None)
    if collector is None:
        return ""
    held = device_bytes((stage.like.params, () if stage.offload else (stage.like.opt, frozen)))
    split = collector.split((stage.config.batch_size, stage.dataset.shape.length), held)
    needed = ", ".join(f"{name} {in_words(size)}" for name, size in split.needed.items())
    return (
        f"completions are sampled with weights {split.words} (rollout.tensor={split.tensor}, {split.why}): on each "
        f"device at most {needed}, beside {in_words(held)} of training"
    )


def as_lines(data: dict[str, Any]) -> str:
    """A data report's figures, with what each source gives and what is held out; its warnings come later."""
    lines = [line for line in as_text(data).splitlines() if not line.startswith("!")]
    records = data["records"]
    more = [f"source {s['path']}: {s['read']:,} read, {s['used']:,} used" for s in records["sources"]]
    if held_out := records.get("held_out"):
        more.append(f"held out {held_out:,} of them for evaluation, {records['used']:,} to train on")
    return "\n".join(f"  {line}" for line in [lines[0], *more, *lines[1:]])


def _counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def show_rows(dataset: Any, tokenizer: Any, count: int = 3) -> list[str]:
    """The first rows of the first batch as text."""
    shown = []
    for number, members in enumerate(dataset.members(0)[:count]):
        lines = [f"row {number}:"]
        for i in members:
            example = dataset.example(int(i))
            lines.append(f"  record {int(i)} prompt: {tokenizer.decode(np.asarray(example.prompt).tolist())!r}")
            names = ("chosen", "rejected") if len(example.completions) == 2 else ("completion",)
            for name, tokens, mask in zip(names, example.completions, example.masks, strict=False):
                lines.append(f"    {name}: {masked_text(tokenizer, np.asarray(tokens), np.asarray(mask))!r}")
        shown.append("\n".join(lines))
    return shown
