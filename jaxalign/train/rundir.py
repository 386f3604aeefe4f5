"""A run's directory: its format, the configuration it belongs to, and its results when it is done.

config.json data_report.json checkpoints/N metrics.jsonl events/ samples/ cache/ export/ DONE
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxalign.disk import cannot_write, trouble, write_whole
from jaxalign.errors import InputError
from jaxalign.parallel.processes import is_main, on_main
from jaxalign.ranges import ADDED

FORMAT = 1

# Fields that may differ between a run and its continuation: they do not change what is computed, or the numbers
# only by rounding (mesh, remat, offload).
_FREE = (
    "workdir",
    "mesh",
    "eval",
    "checkpoint",
    "logging",
    "process_timeout",
    "callbacks",
    "profile",
    "model.remat",
    "algorithm.offload",
    "rollout.num_slots",
    "rollout.tensor",
    "data.cache_dir",
    "data.eval_sources",
)
_LENGTH = ("num_train_steps", "num_epochs")  # may differ under a constant learning rate

# What lies in a run's directory: the run's own, what a stage notes there, and where launchers send what is printed.
_OWN = (
    "config.json",
    "data_report.json",
    "checkpoints",
    "metrics.jsonl",
    "events",
    "samples",
    "cache",
    "export",
    "profile",
    "DONE",
    "stage.json",
    "metrics.jsonl.damaged",
)
DAMAGED = "metrics.jsonl.damaged"  # what metrics.jsonl was, where it held foreign lines
_PRINTED = (".log", ".out", ".err")


class RunDir:
    """The directory of one training stage, local or on an object store (`gs://`, `s3://`).

    Only process 0 writes text into it.
    """

    def __init__(self, workdir: str):
        self.remote = "://" in str(workdir)
        self.path = as_path(str(workdir) if self.remote else os.path.abspath(os.path.expanduser(workdir)))
        self._flag = f"--config.workdir={'BUCKET_URL/NAME' if self.remote else 'runs/NAME'}"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events"
        self.samples = self.path / "samples"
        self.cache = self.path / "cache"
        self.export = self.path / "export"
        self.settled: dict[str, str] = {}  # what a run found out of its machine and keeps to when it resumes
        self.begun = False  # whether `open` found a run's configuration in it
        self._made = False  # whether this call made it

    def open(self, config: Mapping[str, Any], *, resume: bool) -> dict | None:
        """Takes the directory for a run of this configuration.

        Args:
          config: the whole configuration as plain dicts.
          resume: whether to resume what is there.

        Returns:
          The results, where such a run is already done.

        Raises:
          InputError: the directory holds another format, another configuration's run, or a run that may not be resumed;
            or it cannot be made, or holds what no run has written.
        """
        self.make()
        old = self.check(config, resume=resume)
        self.begun = old is not None
        self.settled = (old or {}).get("settled", {})
        if old is not None:
            done = results(self.path)
            same = _pick(old["config"], _LENGTH) == _pick(config, _LENGTH)
            if done is not None and done.get("stopped_early"):  # with another patience it may not be over
                same = same and old["config"]["checkpoint"].get("patience") == config["checkpoint"].get("patience")
            if done is not None and same:
                return done
        if jax.process_count() > 1:  # all have read before one writes
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("run directory read")
        if self.untrained():
            self.begin(config)
        return None

    def check(self, config: Mapping[str, Any], *, resume: bool) -> Any:
        """Whether a run of this configuration may be begun or resumed here; writes nothing.

        Args:
          config: the whole configuration as plain dicts.
          resume: whether to resume what is there.

        Returns:
          `config.json` of the run that is there; None where there is none.

        Raises:
          InputError: it may not.
        """
        old = self._read_config()
        if old is not None:
            self._check(old, config)
            if self.checkpoints.exists() and not resume and any(self.checkpoints.iterdir()):
                raise InputError(
                    f"{self.path} holds checkpoints and checkpoint.resume is False",
                    "a fresh directory, or leave to resume",
                    "--config.workdir=ANOTHER or --config.checkpoint.resume=True",
                )
        elif self.path.exists() and any(self.path.glob("checkpoints/*")):
            raise InputError(
                f"{self.path} has checkpoints but no config.json, and none of them says which configuration it is of",
                "a run directory of jaxalign, or an empty one",
                f"--config.workdir={beside(self.path)}",
            )
        return old

    def begin(self, config: Mapping[str, Any]) -> None:
        """Notes the configuration, once it is known that the run can resume: a refused one leaves all as it was.

        Args:
          config: the whole configuration as plain dicts.
        """
        more = {"settled": self.settled} if self.settled else {}
        self.write_json("config.json", {"format": FORMAT, "config": config} | more)
        if is_main() and (self.path / "DONE").exists():  # a longer run resumes from a finished one
            (self.path / "DONE").unlink()

    def make(self) -> None:
        """Makes the directory where it is not there: process 0 does, and all are told.

        Raises:
          InputError: it cannot be made or written to, or files that no run has written lie in it.
        """
        on_main(self._make)

    def _make(self) -> None:
        with usable(self.path, self._flag):
            known = self.path.exists() and (self.path / "config.json").exists()
            names = [] if known or not self.path.exists() else sorted(p.name for p in self.path.iterdir())
        foreign = [n for n in names if n not in _OWN and not n.startswith(".") and not n.endswith(_PRINTED)]
        if foreign:
            more = f", ... {len(foreign)} in all" if len(foreign) > 4 else ""
            raise InputError(
                f"{self.path} holds files that no run has written: {', '.join(foreign[:4])}{more}",
                "a new or empty directory, or that of an earlier run",
                f"--config.workdir={self.path / 'run'}",
            )
        if self.remote:
            return
        with usable(self.path, self._flag):
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_text("")
            probe.unlink()

    @contextlib.contextmanager
    def left_if_refused(self) -> Iterator[None]:
        """Removes the directory again where `make` made it and the block is refused with nothing but notes in it."""
        try:
            yield
        except InputError:
            notes = {"config.json", "data_report.json"}
            if self._made and is_main() and {path.name for path in self.path.iterdir()} <= notes:
                with contextlib.suppress(OSError):
                    self.path.rmtree()
            raise

    def lost_export(self) -> str:
        """What to say of a finished run whose exported model is gone; "" where it is there."""
        if any(self.export.glob("*.safetensors")):
            return ""
        remedy = f"jaxalign export --workdir={self.path} --out={self.export}"
        return f"the run is done, and {self.export} holds no model any more: {remedy}"

    def untrained(self) -> bool:
        """Whether nothing was learned here yet: no checkpoint, no figures, no end."""
        checkpoints, metrics = self.checkpoints, self.metrics
        return not (
            (self.path / "DONE").exists()
            or (checkpoints.exists() and any(checkpoints.iterdir()))
            or (metrics.exists() and metrics.read_bytes().strip())
        )

    def _read_config(self) -> Any:
        """`config.json`; where it is gone or damaged, what the last checkpoint has kept of it; None for a new run."""
        problem = None
        try:
            found = self.read_json("config.json")
        except InputError as error:
            found, problem = None, error
        if found is not None:
            return found
        if self.checkpoints.exists():
            from jaxalign.parallel.processes import say
            from jaxalign.train.checkpoints import read_meta

            steps = sorted((int(p.name) for p in self.checkpoints.iterdir() if p.name.isdigit()), reverse=True)
            for step in steps:
                with contextlib.suppress(Exception):  # damaged: the one before it
                    kept = read_meta(self.checkpoints / str(step))["config"]
                    say(f"{self.path / 'config.json'} is gone or damaged: made again from checkpoint {step}")
                    return {"format": FORMAT, "config": kept}
        if problem is not None:
            raise problem
        return None

    def _check(self, old: Any, config: Mapping[str, Any]) -> None:
        if not isinstance(old, Mapping) or "config" not in old or "format" not in old:
            raise InputError(
                f"{self.path / 'config.json'} is not a run's",
                "a new or empty directory, or that of an earlier run",
                f"--config.workdir={self.path / 'run'}",
            )
        if old["format"] != FORMAT:
            raise InputError(
                f"{self.path} has run format {old.get('format')}",
                f"format {FORMAT}, which this version of jaxalign writes",
                "--config.workdir=ANOTHER, or the version of jaxalign that wrote it",
            )
        if self.untrained():  # it failed before its first step: its fields may change
            return
        free = _FREE + (_LENGTH if config["optimizer"]["schedule"] == "constant" else ())
        changed = [
            f"{field} (was {before!r}, is {after!r})"
            for field, before, after in _differences(old["config"], json.loads(json.dumps(config)))
            if not (before is None and field in ADDED and after == ADDED[field])
            and not any(field == f or field.startswith(f"{f}.") for f in free)
        ]
        if changed:
            length = any(c.startswith(_LENGTH) for c in changed)
            why = " (the schedule of the learning rate depends on the run's length)" if length else ""
            raise InputError(
                f"{self.path} holds a run of another configuration: {'; '.join(changed[:6])}",
                f"the same configuration, to resume that run, or a directory of its own{why}",
                f"--config.workdir={beside(self.path)}, or remove {self.path} to begin anew in it",
            )

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file as a whole: a reader sees the old one or the new one."""
        if not is_main():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / name, json.dumps(_finite(value), indent=1, sort_keys=True) + "\n")

    def read_json(self, name: str) -> Any:
        """The file's value, None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise InputError(
                f"{path} cannot be read: {error}",
                "JSON, as a run writes it",
                f"--config.workdir={beside(self.path)}, or remove that file",
            ) from error


def results(path: Any) -> dict[str, Any] | None:
    """The results of a run that is done, from `DONE`; None where there is none, or it is not what a run writes.

    A damaged one is made again: the run resumes from its last checkpoint, which is its end.

    Args:
      path: the run's directory, an `epath.Path`.
    """
    try:
        found = json.loads((path / "DONE").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "steps" in found else None


@contextlib.contextmanager
def usable(path: Any, flag: str) -> Iterator[None]:
    """Makes a failure of the file system in the block one of input: a path where nothing can be written.

    Args:
      path: what is read or written in the block.
      flag: that names another one.
    """
    try:
        yield
    except OSError as error:
        if (words := trouble(error)) is not None:
            raise cannot_write(path, words) from error
        raise InputError(
            f"{path}: {error.strerror or error}", "a directory that can be made and written to", flag
        ) from error


def beside(path: Any) -> str:
    """A name like this one that is not taken."""
    n = 2
    while (found := path.parent / f"{path.name}-{n}").exists():
        n += 1
    return os.fspath(found)


def as_path(workdir: str, *parts: str) -> Any:
    """A path on disk or in an object store.

    Raises:
      InputError: a store that checkpoints cannot go to, or whose package is not installed.
    """
    from etils import epath

    if "://" in workdir:
        import fsspec

        try:
            fsspec.get_filesystem_class(workdir.partition("://")[0])
            return epath.Path(workdir, *parts)
        except (ImportError, KeyError, ValueError) as error:  # KeyError: known to fsspec, not to checkpoints
            reason = f" ({error})" if isinstance(error, ImportError) else ""
            raise InputError(
                f"workdir {workdir}{reason}",
                "a directory, or a URL with gs:// or s3:// and the package that opens it",
                "--config.workdir=gs://BUCKET/RUN, and pip install gcsfs for gs://, s3fs for s3://",
            ) from error
    return epath.Path(os.path.expanduser(workdir), *parts)


def _differences(old: Any, new: Any, prefix: str = ""):
    """(dotted field, old value, new value) of every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pick(config: Mapping[str, Any], names) -> dict:
    return {n: config.get(n) for n in names}


def require_shared(run: RunDir) -> None:
    """Refuses a workdir that not every process sees: checkpoints need all of them to write into one.

    Raises:
      InputError: on every process, where one host cannot see what another wrote.
    """
    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    token = run.path / f".seen-{int(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))}"
    if is_main():
        token.write_text("")
    multihost_utils.sync_global_devices("workdir written")
    deadline = time.monotonic() + 5  # network file systems may lag
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone = multihost_utils.process_allgather(np.array(seen))
    if is_main():
        token.unlink()
    if not np.all(everyone):
        raise InputError(
            f"workdir {run.path} is local to a host: processes {np.flatnonzero(~everyone).tolist()} do not see it",
            "a directory that all hosts share (a network file system or gs://, s3://)",
            "--config.workdir=gs://BUCKET/RUN",
        )
