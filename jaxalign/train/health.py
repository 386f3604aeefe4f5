"""Signs of training failures, computed from logged metrics; `docs/troubleshooting.md` says what to do about each.

| failure | sign |
|---|---|
| loss stuck | `health/stuck_steps`: steps in a row with all pairs' rewards 0 (or the loss as it was) |
| chosen completions become unlikely too | `health/chosen_logps_change`: nats against the reference, late steps |
| sudden blow-up | `health/{grad_norm,kl,value_loss}_jump`: against the median of late steps |
| mode collapse | `samples/distinct_2`, `samples/distinct_samples`, `samples/entropy` fall |
| drift from the reference | `samples/kl`, `objective/kl` |
| repetitive text | `samples/repetition_4` |
| models that never stop | `samples/eos_share`, `samples/length` |
| reward hacking | `samples/length_score_correlation` |
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from jaxalign.evaluate.diversity import distinct_ngrams, distinct_samples, length_correlation, repetition

_FIRST = 8  # steps before jumps are measured
_WINDOW = 32  # late steps: whose median a jump is measured against, whose mean a change is

# (sign, metric): value over the median of the last steps
_JUMPS = (
    ("health/grad_norm_jump", ("grad_norm", "grad_norm/policy")),
    ("health/kl_jump", ("objective/kl",)),
    ("health/value_loss_jump", ("loss/value",)),
)

# (sign, limit, meaning); reported once.  Healthy runs stayed below: gradients jumped 24-fold at most.
_LIMITS = (
    ("health/stuck_steps", 5.0, "nothing has changed for {value:.0f} steps: a larger learning rate, other data"),
    ("health/chosen_logps_change", -30.0, "chosen completions become unlikely too, by {value:.0f} nats"),
    ("health/grad_norm_jump", 30.0, "the gradient is {value:.0f} times as large as it was"),
    ("health/kl_jump", 30.0, "the KL is {value:.0f} times as large as it was"),
    ("health/value_loss_jump", 30.0, "the value loss is {value:.0f} times as large as it was"),
)
_ENDS = 8  # late losses that are compared with the first one
_RISE = 0.05  # share of the first loss by which a loss that rose is above it


class Health:
    """Follows a run's metrics and adds the signs that need its past."""

    def __init__(self, past: Iterable[Mapping[str, float]] = (), *, beta: float | None = None):
        """
        Args:
          past: rows of the run's metrics before a resume; the signs continue from there.
          beta: of a preference loss, by which its rewards are log-ratios in nats.
        """
        self._stuck = 0
        self._beta = beta
        self._chosen: deque[float] = deque(maxlen=_WINDOW)
        self._recent: dict[str, deque[float]] = {sign: deque(maxlen=_WINDOW) for sign, _ in _JUMPS}
        self._last_loss: float | None = None
        self._first_loss: float | None = None
        self._losses: deque[float] = deque(maxlen=_ENDS)
        self._steps, self._still = 0, False
        self._told: dict[str, str] = {}
        for row in past:
            self.news(int(row.get("step") or 0), self.signs(row))

    def signs(self, metrics: Mapping[str, float | None]) -> dict[str, float]:
        """The signs at this step.

        Args:
          metrics: of one step, by the names of `metrics.jsonl`.

        >>> health = Health()
        >>> _ = health.signs({"loss": 0.6931, "rewards/margins": 0.0})
        >>> health.signs({"loss": 0.6931, "rewards/margins": 0.0})
        {'health/stuck_steps': 2.0}
        """
        signs: dict[str, float] = {}
        loss = metrics.get("loss")
        if loss is not None:
            margins = metrics.get("rewards/margins")
            still = margins == 0.0 if margins is not None else loss == self._last_loss
            self._stuck = self._stuck + 1 if still else 0
            self._last_loss = loss
            signs["health/stuck_steps"] = float(self._stuck)
            self._first_loss = loss if self._first_loss is None else self._first_loss
            self._losses.append(loss)
            self._steps += 1
        chosen = metrics.get("rewards/chosen")
        if chosen is not None and self._beta:
            self._chosen.append(chosen / self._beta)
            signs["health/chosen_logps_change"] = statistics.fmean(self._chosen)
        norm = next((metrics[n] for n in ("grad_norm", "grad_norm/policy") if metrics.get(n) is not None), None)
        self._still = norm == 0.0
        for sign, names in _JUMPS:
            value = next((metrics[n] for n in names if metrics.get(n) is not None), None)
            if value is None or not math.isfinite(value):
                continue
            recent = self._recent[sign]
            typical = statistics.median(abs(v) for v in recent) if len(recent) >= _FIRST else 0.0
            if typical > 0:
                signs[sign] = abs(value) / typical
            recent.append(value)
        return signs

    def news(self, step: int, signs: Mapping[str, float]) -> list[str]:
        """Sentences about the signs that are too far out for the first time.

        Args:
          step: batches done.
          signs: at this step.

        >>> health = Health()
        >>> health.news(40, {"health/grad_norm_jump": 51.3}), health.news(41, {"health/grad_norm_jump": 70.0})
        (['the gradient is 51 times as large as it was (health/grad_norm_jump)'], [])
        """
        found = []
        for sign, limit, text in _LIMITS:
            value = signs.get(sign)
            if value is None or sign in self._told or (value > limit if limit < 0 else value < limit):
                continue
            found.append(f"{text.format(value=abs(value))} ({sign})")
            self._told[sign] = f"{sign} {value:.4g} at step {step}"
        return found

    def concern(self) -> str:
        """What went wrong in the run as a whole, in a sentence; empty where nothing did.

        >>> health = Health()
        >>> _ = [health.signs({"loss": loss}) for loss in (4.25, 90.0, 7.5, 6.24)]
        >>> health.concern()
        'the loss rose from 4.25 to 6.24: try a smaller optimizer.learning_rate'
        """
        found = []
        if self._steps > 1:
            count = min(_ENDS, max(self._steps // 4, 1))
            first, last = self._first_loss, statistics.fmean(list(self._losses)[-count:])
            if last - first > _RISE * abs(first) + 0.01:
                found.append(f"the loss rose from {first:.4g} to {last:.4g}: try a smaller optimizer.learning_rate")
        if self._still:
            found.append("the gradient is 0 at the end: nothing is learned any more")
        return "; ".join(found + list(self._told.values()))


def sample_signs(
    samples: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    logprobs: Sequence[Sequence[float]] | None = None,
    scores: Sequence[float] | None = None,
) -> dict[str, float]:
    """Signs of collapse in a model's samples.

    Args:
      samples: token ids of each completion.
      finished: whether each ended by a stop token.
      logprobs: of each sampled token, nats; their mean's negative estimates the entropy.
      scores: reward of each completion.

    >>> signs = sample_signs([[5, 6, 5, 6, 5, 6], [7, 8]], finished=[True, False])
    >>> signs["samples/eos_share"], signs["samples/length"], round(signs["samples/distinct_2"], 3)
    (0.5, 4.0, 0.5)
    """
    lengths = [len(s) for s in samples]
    signs = {
        "samples/length": statistics.fmean(lengths),
        "samples/eos_share": statistics.fmean(finished),
        "samples/distinct_1": distinct_ngrams(samples, 1),
        "samples/distinct_2": distinct_ngrams(samples, 2),
        "samples/distinct_samples": distinct_samples(samples),
        "samples/repetition_4": repetition(samples, 4),
    }
    if logprobs is not None and any(len(row) for row in logprobs):
        signs["samples/entropy"] = -statistics.fmean(v for row in logprobs for v in row)
    if scores is not None:
        signs["samples/score"] = statistics.fmean(scores)
        signs["samples/length_score_correlation"] = length_correlation(lengths, scores)
    return {name: value for name, value in signs.items() if math.isfinite(value)}
