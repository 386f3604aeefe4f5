"""Disk space for a run's checkpoints and export, checked before the first step."""

from __future__ import annotations

import functools
import os
import shutil

from jaxalign.errors import InputError
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.processes import on_main
from jaxalign.train.compiled import in_words
from jaxalign.train.stage import Stage

_COMPRESSED = 0.7  # of its bytes a checkpoint takes at least: moments that are still 0 take nearly nothing


def check_room(stage: Stage, saved: int = 0) -> list[str]:
    """Refuses a run where not even one checkpoint fits; object stores are not asked.

    A new checkpoint is complete before an old one is deleted: for a while there is one more than `checkpoint.keep`.

    Args:
      stage: data, models and compiled steps.
      saved: checkpoints that are there already.

    Returns:
      A warning where fewer fit than the run will keep.

    Raises:
      InputError: on every process, with the bytes needed and there.
    """
    return on_main(functools.partial(_check, stage, saved))


def _check(stage: Stage, saved: int) -> list[str]:
    if stage.directory.remote:
        return []
    path, keep = stage.directory.path, stage.config.checkpoint.keep
    usage = shutil.disk_usage(os.fspath(path))
    parameters, optimizer = num_bytes(stage.like.params), num_bytes(stage.like.opt)
    one, export = parameters + optimizer, num_bytes(stage.like.params[stage.program.exported])
    most = one * max(1, keep + 1 - saved + bool(stage.config.checkpoint.best_metric)) + export
    if not usage.total or usage.free >= most:
        return []
    found = (
        f"{in_words(usage.free)} free in {path}; a checkpoint takes up to {in_words(one)} (parameters "
        f"{in_words(parameters)}, optimizer {in_words(optimizer)}), the export {in_words(export)}"
    )
    if usage.free >= one * _COMPRESSED:
        return [f"{found}, and all that are kept together {in_words(most)}"]
    optimizer_config = stage.config.optimizer
    may_shrink = optimizer_config.name == "adamw" and not optimizer_config.state_dtype
    smaller = ", or --config.optimizer.state_dtype=int8" * may_shrink
    raise InputError(
        found,
        f"room for one at least; for checkpoint.keep={keep} {in_words(most)} at most",
        f"make room there (df -h {path}), or --config.workdir=ANOTHER{smaller}",
    )
