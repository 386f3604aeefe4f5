"""Signs of what goes wrong, computed from what is logged anyway; what to do about them is told elsewhere.

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


class Health:
    """Follows a run's metrics and adds the signs that need its past."""

    def __init__(self, past: Iterable[Mapping[str, float]] = (), *, beta: float | None = None):
        """
        Args:
          past: rows of the run's metrics before a resume; the signs go on from there.
          beta: of a preference loss, by which its rewards are log-ratios in nats.
        """
        self._stuck = 0
        self._beta = beta
        self._chosen: deque[float] = deque(maxlen=_WINDOW)
        self._recent: dict[str, deque[float]] = {sign: deque(maxlen=_WINDOW) for sign, _ in _JUMPS}
        self._last_loss: float | None = None
        for row in past:
            self.signs(row)

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
        chosen = metrics.get("rewards/chosen")
        if chosen is not None and self._beta:
            self._chosen.append(chosen / self._beta)
            signs["health/chosen_logps_change"] = statistics.fmean(self._chosen)
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
