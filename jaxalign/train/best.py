"""The metric that selects the best checkpoint, checked before training starts, and early stopping by it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxalign.errors import InputError
from jaxalign.steps.step import make_eval_step
from jaxalign.train.arguments import batch_of, frozen_parameters
from jaxalign.train.stage import Stage


class Patience:
    """Ends a run when `checkpoint.patience` evaluations in a row have not improved `checkpoint.best_metric`.

    Its state comes from `metrics.jsonl`, so a resumed run stops at the same step as an uninterrupted one.
    """

    def __init__(self, config: Any, rows: Iterable[Mapping[str, Any]] = ()):
        """
        Args:
          config: of the stage.
          rows: of its `metrics.jsonl`, up to the step that it resumes from.
        """
        c = config.checkpoint
        self._evaluations, self._every = c.patience, config.eval.every
        self._metric = f"eval/{(c.best_metric or '').removeprefix('eval/')}"
        self._sign = 1.0 if c.best_mode == "min" else -1.0
        self._best: tuple[int, float] | None = None  # step and value
        self._since = 0  # evaluations since then
        for row in rows:
            self.add(row["step"], row)

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Counts an evaluation at a multiple of `eval.every`; the extra one of a run that is stopped does not count."""
        if not self._evaluations or step % self._every or self._metric not in row:
            return
        value = row[self._metric]
        finite = value is not None and math.isfinite(value)  # metrics.jsonl has null for a value that is not finite
        better = finite and (self._best is None or self._sign * value < self._sign * self._best[1])
        self._best, self._since = ((step, value), 0) if better else (self._best, self._since + 1)

    @property
    def spent(self) -> bool:
        """Whether the run is to end."""
        return bool(self._evaluations) and self._since >= self._evaluations

    def sentence(self, step: int) -> str:
        """Why the run ended at this step."""
        best = "" if self._best is None else f"; the best is {self._best[1]:.6g}, of step {self._best[0]:,}"
        return f"stopped early at step {step:,}: {self._since} evaluations without a better {self._metric}{best}"


def check_best_metric(stage: Stage) -> None:
    """Refuses a `checkpoint.best_metric` that no evaluation reports; nothing is computed.

    Args:
      stage: data, models and compiled steps.

    Raises:
      InputError: naming the metrics that evaluations report.
    """
    name = stage.config.checkpoint.best_metric
    if not name:
        return
    known = [f"eval/{metric}" for metric in eval_metrics(stage)]
    wanted = f"eval/{name.removeprefix('eval/')}"
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)[0]
        late = rarely(stage)
        raise InputError(
            "; ".join([f"checkpoint.best_metric is {name!r}", *late]),
            f"one of {', '.join(known)}",
            f"--config.checkpoint.best_metric={near}"
            + f" --config.eval.every={max(1, stage.num_steps // 10)}" * bool(late),
        )


def rarely(stage: Stage, steps: int | None = None) -> list[str]:
    """A warning where `eval.every` is larger than the run: only the last step is evaluated.

    Args:
      stage: of any algorithm.
      steps: of the run; None: the stage's own.
    """
    every, best = stage.config.eval.every, stage.config.checkpoint.best_metric
    steps = steps or stage.num_steps
    if stage.eval_dataset is None or every <= steps:
        return []
    choice = f", and checkpoint.best_metric={best} has nothing to choose from" if best else ""
    return [f"eval.every is {every:,} and the run has {steps:,} steps: only its end is evaluated{choice}"]


def eval_metrics(stage: Stage) -> list[str]:
    """The names of an evaluation's metrics, from the shapes of a batch."""
    program = stage.program
    if program.eval_metrics is not None:
        return program.eval_metrics()
    step, given = make_eval_step(program.objective), (frozen_parameters(stage), stage.like.extra)
    return sorted(jax.eval_shape(step, stage.like.params, *given, batch_of(stage, stage.eval_dataset)))
