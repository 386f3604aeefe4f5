"""A stage's directory: skip, resume or move aside what is in it, and the record of what it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxalign.config import Validated, to_dict
from jaxalign.disk import write_whole
from jaxalign.errors import InputError
from jaxalign.pipeline.keys import Keys
from jaxalign.ranges import ANOTHER_REWARD

RECORD = "stage.json"  # in a stage's directory: its key, and what the key was made of
FORMAT = 1


class PlannedStage(NamedTuple):
    """One stage, ready to run."""

    name: str  # "" for a configuration without stages
    checked: Validated  # whole: workdir and inputs filled in
    key: str  # hex digits
    inputs: dict[str, str]  # role in `from` -> name of the stage
    keys: Keys = Keys("", "", "", {})

    @property
    def config(self) -> ConfigDict:
        """Its configuration."""
        return self.checked.config


def is_done(workdir: str) -> bool:
    """Whether a run reached its end in this directory."""
    from jaxalign.train.rundir import results

    return results(path_of(workdir)) is not None


def remember(stage: PlannedStage) -> None:
    """Stores the digests of a run's input files with its results, to notice changed files when it is run again."""
    from jaxalign.train.rundir import results

    path = path_of(stage.config.workdir)
    if found := results(path):
        write_whole(path / "DONE", json.dumps(found | {"files": stage.keys.files}, indent=1, sort_keys=True) + "\n")


def changed(stage: PlannedStage, before: dict[str, Any]) -> str:
    """Input files of a finished run that have changed since."""
    now = stage.keys.files
    return ", ".join(p for p, digest in before.get("files", {}).items() if p in now and now[p] != digest)


RUN, SKIP = 1, 2
# Files that a dry run or a run that failed before its first step leaves: no result among them.
_SCRATCH = ("cache", "data_report.json")
_BEGUN = (*_SCRATCH, RECORD, "config.json", "checkpoints", "metrics.jsonl", "events")


def prepare(stage: PlannedStage, say: Callable[[str], None]) -> int:
    """Decides whether a stage is skipped, resumed or begun anew, and prepares its directory, under its lock."""
    from jaxalign.train.lock import Lock
    from jaxalign.train.rundir import RunDir, usable

    if is_done(stage.config.workdir) and _known(stage).get("key") == stage.key:
        say(f"stage {stage.name}: done before, kept ({path_of(stage.config.workdir)})")
        if lost := RunDir(stage.config.workdir).lost_export():
            say(f"warning: stage {stage.name}: {lost}")
        return SKIP
    lock = Lock(path_of(stage.config.workdir))
    lock.take()
    try:
        with usable(stage.config.workdir, "--config.workdir=runs/NAME"):
            return _prepared(stage, say, lock)
    finally:
        lock.release()


def _prepared(stage: PlannedStage, say: Callable[[str], None], lock: Any) -> int:
    workdir = path_of(stage.config.workdir)
    if workdir.exists() and not _is_fresh(stage.config.workdir):
        record = _known(stage)
        known = record.get("key")
        if known == stage.key:
            say(f"stage {stage.name}: resuming ({workdir})")
            return RUN
        if _longer(stage, record):
            say(f"stage {stage.name}: resuming to another length ({workdir})")
            return RUN
        another = _scored_anew(stage, record)
        if another and stage.config.checkpoint.resume == ANOTHER_REWARD:
            say(f"stage {stage.name}: resuming with another reward ({workdir})")
            note(stage)
            return RUN
        n = 1
        while (aside := workdir.parent / f"{workdir.name}.old-{n}").exists():
            n += 1
        workdir.rename(aside)
        lock.directory = aside  # where it went along
        reason = "its configuration or an input changed" if known else "it was not made by this configuration"
        if another:
            flag = f"--config.{stage.name}.checkpoint.resume={ANOTHER_REWARD}"
            reason = f"the file of rewards.function changed, with which {flag} resumes"
        say(f"stage {stage.name}: {reason}; the earlier result is kept as {aside}")
    say(f"stage {stage.name}: runs ({workdir})")
    workdir.mkdir(parents=True, exist_ok=True)
    note(stage)
    return RUN


def note(stage: PlannedStage) -> None:
    """Writes the record of a stage's directory."""
    text = {
        "format": FORMAT,
        "key": stage.key,
        "base": stage.keys.base,
        "unscored": stage.keys.unscored,
        "name": stage.name,
        "from": stage.inputs,
        "config": to_dict(stage.config),
    }
    write_whole(path_of(stage.config.workdir, RECORD), json.dumps(text, indent=2, sort_keys=True) + "\n")


def _longer(stage: PlannedStage, record: dict) -> bool:
    """Whether a directory holds a shorter run of a stage that can resume from its last checkpoint.

    So it is where nothing but the length changed, under a learning rate that does not depend on it.
    """
    before, now = record.get("config", {}), stage.config
    if record.get("base") != stage.keys.base or now.optimizer.schedule != "constant":
        return False
    field = "num_epochs" if now.num_train_steps is None else "num_train_steps"
    if (before.get("num_train_steps") is None) != (now.num_train_steps is None) or before[field] > now[field]:
        return False
    return any(path_of(now.workdir, "checkpoints").glob("[0-9]*"))


def _scored_anew(stage: PlannedStage, record: dict) -> bool:
    """Whether a directory holds an unfinished run in which nothing but the file of the reward function changed."""
    if record.get("unscored") != stage.keys.unscored or is_done(stage.config.workdir):
        return False
    return any(path_of(stage.config.workdir, "checkpoints").glob("[0-9]*"))


def _is_fresh(workdir: str) -> bool:
    """Whether a stage's directory holds no result, and no files but a stage's own."""
    from jaxalign.train.rundir import RunDir

    names = {path.name for path in path_of(workdir).iterdir() if not path.name.startswith(".")}
    return names <= set(_SCRATCH) or (RECORD in names and names <= set(_BEGUN) and RunDir(workdir).untrained())


def _known(stage: PlannedStage) -> dict:
    """The record of a stage's directory; empty where there is none.

    Raises:
      InputError: it is damaged.
    """
    path = path_of(stage.config.workdir, RECORD)
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        record["key"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is damaged: which configuration this stage was made by is not known",
            "the file as it was written",
            f"rm {path}, and the stage's directory is put aside and the stage run anew",
        ) from error
    return record


def path_of(*parts: str):
    """A path on disk or in an object store."""
    from jaxalign.train.rundir import as_path

    return as_path(*parts)
