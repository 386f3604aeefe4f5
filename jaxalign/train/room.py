"""Disk space for a run's checkpoints and export, checked before the first step and before checkpoints by time."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil

from jaxalign.errors import InputError
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.processes import on_main
from jaxalign.train.compiled import in_words
from jaxalign.train.stage import Stage

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
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
    try:
        usage = shutil.disk_usage(os.fspath(path))
    except OSError as error:
        return [_not_known(path, error)]
    one, export = _sizes(stage)
    most = one * max(1, _kept(stage) + 1 - saved) + export
    if not usage.total or usage.free >= most:
        return []
    parameters, optimizer = num_bytes(stage.like.params), num_bytes(stage.like.opt)
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


def against_saving(stage: Stage, saved: int) -> str:
    """Why no checkpoint is to be made by time: it would take the room of the one at the end, or of the export.

    Args:
      stage: data, models and compiled steps.
      saved: checkpoints that are there, one that is being written among them.

    Returns:
      A sentence; "" where there is room, and for object stores, which are not asked.
    """
    if stage.directory.remote:
        return ""
    path, (one, export) = stage.directory.path, _sizes(stage)
    more = max(_kept(stage) - saved, 0)
    # Where no more are to stay, one of those that are there goes when this one is complete, and so at the end.
    needed = one * min(1 + more, 2) + export * (more > 1)
    try:
        usage, (rest, goes) = shutil.disk_usage(os.fspath(path)), _being_written(stage, saved, one)
    except OSError as error:  # such as a mount that is gone for a while
        return f"no checkpoint by time while {_not_known(path, error)}"
    needed = rest + max(needed - goes, 0)
    if not usage.total or usage.free >= needed:
        return ""
    return (
        f"no checkpoint by time while {in_words(usage.free)} are free in {path}: with what is saved at the end "
        f"it takes up to {in_words(needed)} (df -h {path})"
    )


def _being_written(stage: Stage, saved: int, one: int) -> tuple[int, int]:
    """Bytes that the checkpoint which is being written will still take, and of those that go once it is complete."""
    whole = begun = there = 0
    with contextlib.suppress(FileNotFoundError):  # it became complete meanwhile, or there is none yet
        for directory in os.scandir(stage.directory.checkpoints):
            whole += directory.name.isdecimal()
            if _UNFINISHED in directory.name:
                begun += 1
                files = (os.path.join(at, name) for at, _, names in os.walk(directory.path) for name in names)
                there += sum(os.lstat(file).st_size for file in files)
    return max(begun * one - there, 0), max(whole + begun - saved, 0) * one * bool(begun)


def _not_known(path: object, error: OSError) -> str:
    return f"the free room of {path} is not known: {error.strerror or error}"


def _kept(stage: Stage) -> int:
    """Checkpoints that stay, at most."""
    return stage.config.checkpoint.keep + bool(stage.config.checkpoint.best_metric)


def _sizes(stage: Stage) -> tuple[int, int]:
    """Bytes of a checkpoint and of the export, at most."""
    return num_bytes((stage.like.params, stage.like.opt)), num_bytes(stage.like.params[stage.program.exported])
