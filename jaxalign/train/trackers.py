"""Trackers of experiments, by name in `logging.trackers`: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxalign.disk import writing
from jaxalign.errors import InputError
from jaxalign.train.rundir import RunDir

_PROJECT = "jaxalign"  # where `logging.project` names none


class Tracker(Protocol):
    """What receives a run's figures."""

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Takes the figures of a step; None is one that is not finite."""

    def close(self) -> None:
        """Writes what is left."""


class Kind(NamedTuple):
    """A tracker by its name."""

    package: str  # that it takes
    install: str
    start: Callable[[RunDir, Any, int, Mapping[str, Any]], Tracker]


def start_trackers(run: RunDir, cfg: Any, start: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Starts every tracker of `logging.trackers`.

    Args:
      run: the run's directory.
      cfg: the `logging` section.
      start: the step that the run resumes from.
      config: the whole configuration.

    Raises:
      InputError: a package is missing.
    """
    check_trackers(cfg.trackers)
    return [TRACKERS[name].start(run, cfg, start, config) for name in cfg.trackers]


def check_trackers(names: Sequence[str]) -> None:
    """Makes sure that the packages are there, before anything is loaded; none is imported.

    Raises:
      InputError: one is missing; with the command that installs it.
    """
    for name in names:
        if not _installed(TRACKERS[name].package):
            rest = ",".join(other for other in names if other != name) or "None"
            raise InputError(
                f"logging.trackers holds {name!r}, and {TRACKERS[name].package} is not installed",
                f"the package, or trackers without {name}",
                f"{TRACKERS[name].install}, or --config.logging.trackers={rest}",
            )


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


class Events:
    """Figures for TensorBoard, without a thread of their own: one that dies of a full disk hangs whoever feeds it."""

    _EVERY = 30.0  # seconds between flushes: each is an upload to an object store

    def __init__(self, run: RunDir, start: int):
        """
        Args:
          run: the run's directory; the events lie in `events/`.
          start: the step that the run resumes from; TensorBoard forgets later ones, left by a crash.
        """
        from tensorboardX import proto, summary
        from tensorboardX.event_file_writer import EventsWriter, directory_check

        self._run, self._event, self._scalar = run, proto.event_pb2.Event, summary.scalar
        directory = os.fspath(run.events)
        directory_check(directory)
        self._writer = EventsWriter(os.path.join(directory, "events"), f".{os.getpid()}")
        self._flushed = 0.0
        begun = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=start + 1, session_log=begun))

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds the figures of a step; None is left out."""
        with writing(self._run.events):
            for name, value in _finite(values):
                self._writer.write_event(
                    self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
                )
            if time.monotonic() - self._flushed > self._EVERY:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with writing(self._run.events):
            self._writer.close()


def _tensorboard(run: RunDir, cfg: Any, start: int, config: Mapping[str, Any]) -> Tracker:
    del cfg, config
    try:
        return Events(run, start)
    except ImportError as error:  # object stores need their own client
        raise InputError(
            f"TensorBoard events in {run.events}: {error}",
            "the store's client library, or no events",
            "--config.logging.trackers=None",
        ) from error


class _Wandb:
    def __init__(self, run: RunDir, cfg: Any, start: int, config: Mapping[str, Any]):
        import wandb

        del start
        ident = hashlib.blake2b(str(run.path).encode(), digest_size=8).hexdigest()  # a resumed run continues its curves
        self._run = wandb.init(
            project=cfg.project or _PROJECT,
            name=cfg.run_name or str(run.path),
            id=ident,
            config=dict(config),
            tags=list(cfg.tags),
            resume="allow",
        )

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        self._run.log(dict(_finite(values)), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: RunDir, cfg: Any, start: int, config: Mapping[str, Any]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(cfg.project or _PROJECT)
        kept = run.path / ".mlflow"  # the run's id: a resumed run continues its curves
        if start and kept.exists():
            mlflow.start_run(run_id=kept.read_text().strip())
            return
        begun = mlflow.start_run(run_name=cfg.run_name or str(run.path))
        kept.write_text(begun.info.run_id)
        mlflow.set_tags(dict.fromkeys(cfg.tags, "true"))
        mlflow.log_params({name: str(value)[:500] for name, value in _flat(config)})

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        self._mlflow.log_metrics(dict(_finite(values)), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _finite(values: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in values.items() if value is not None)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# By the name that `logging.trackers` gives; `ranges.TRACKERS` are the same names.
TRACKERS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", "pip install tensorboardX", _tensorboard),
    "wandb": Kind("wandb", "pip install 'jaxalign[wandb]'", _Wandb),
    "mlflow": Kind("mlflow", "pip install 'jaxalign[mlflow]'", _MLflow),
}
