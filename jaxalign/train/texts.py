"""An iteration's completions on the host: as text for a reward, as lines for the log, as signs of collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.data.records import Record
from jaxalign.evaluate import diversity
from jaxalign.rewards.samples import Samples
from jaxalign.rewards.scores import Score
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.engine import continuation, end_markers, without_marker
from jaxalign.rollout.host import all_rows, local_rows
from jaxalign.types import Batch


def read_samples(
    batch: Batch,
    rollout: Rollout,
    step: int,
    *,
    records: Callable[[int], Record],
    tokenizer: Any,
    stop_ids: Sequence[int] = (),
) -> tuple[Samples, list[str], np.ndarray]:
    """This process's completions as text.

    Args:
      batch: the prompt of each completion.
      rollout: the completions.
      step: optimizer updates made so far.
      records: from a record's number to the record.
      tokenizer: of the policy.
      stop_ids: the tokens that end a completion; markers among them are no text.

    Returns:
      The completions, their prompts as text (those of messages as the policy reads them), and which of this process's
      rows they are in, bool [B].
    """
    ids, used = local_rows(batch.record_ids)[:, 0], local_rows(batch.completions.mask)[:, 0]
    tokens, present = local_rows(rollout.tokens), local_rows(rollout.present)
    finished = local_rows(rollout.finished)
    asked = [records(int(i)) for i in ids[used]]
    completions = [t[m].tolist() for t, m in zip(tokens[used], present[used], strict=True)]
    markers = end_markers(tokenizer, stop_ids)
    said = [without_marker(c, markers) for c in completions]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    prompts = _prompt_ids(batch, used)
    for i, record in enumerate(asked):
        if isinstance(record.prompt, str):
            texts[i] = continuation(tokenizer, prompts[i], said[i])
    shown = [
        r.prompt if isinstance(r.prompt, str) else tokenizer.decode(p) for r, p in zip(asked, prompts, strict=True)
    ]
    return (
        Samples(
            prompts=[r.prompt for r in asked],
            completions=texts,
            completion_ids=completions,
            finished=finished[used].tolist(),
            records=asked,
            step=step,
        ),
        shown,
        used,
    )


def _prompt_ids(batch: Batch, used: np.ndarray) -> list[list[int]]:
    """Token ids of this process's prompts."""
    tokens, start = local_rows(batch.rows.tokens)[used], local_rows(batch.rows.attend_start)[used]
    return [t[first:].tolist() for t, first in zip(tokens, start[:, -1], strict=True)]


def sample_lines(
    samples: Samples, prompts: list[str], scores: list[float | None], parts: Mapping[str, Sequence[Score]]
) -> list[dict[str, Any]]:
    """A line for the log of each completion.

    Args:
      samples: the completions.
      prompts: their prompts as text.
      scores: theirs, None where the reward did not apply.
      parts: the scores by part; none are written where there is one.
    """
    return [
        {
            "prompt": prompts[i],
            "completion": samples.completions[i],
            "score": None if scores[i] is None else float(scores[i]),
            "finished": bool(samples.finished[i]),
            "num_tokens": len(samples.completion_ids[i]),
        }
        | ({"scores": {name: part[i] for name, part in parts.items()}} if parts else {})
        for i in range(len(prompts))
    ]


def text_metrics(rollout: Rollout, samples: Samples, scores: list[float | None]) -> dict[str, float]:
    """Signs of collapse over the global batch; how scores go with length, over this process's rows.

    Args:
      rollout: the completions of all processes.
      samples: those of this one.
      scores: theirs, None where the reward did not apply.
    """
    tokens, present = all_rows(rollout.tokens), all_rows(rollout.present)
    ids = [t[m].tolist() for t, m in zip(tokens, present, strict=True) if m.any()]
    scored = [(len(i), s) for i, s in zip(samples.completion_ids, scores, strict=True) if s is not None]
    return {
        "rollout/distinct_1": diversity.distinct_ngrams(ids, 1),
        "rollout/distinct_2": diversity.distinct_ngrams(ids, 2),
        "rollout/distinct_samples": diversity.distinct_samples(ids),
        "rollout/repetition": diversity.repetition(ids, 3),
        "rollout/length_score_correlation": diversity.length_correlation(*map(list, zip(*scored, strict=True)))
        if scored
        else math.nan,
    }
