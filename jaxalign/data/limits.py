"""Length limits: how over-long records are truncated, and which are dropped."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxalign.data.tokenize import Dropped, Example


class Limits(NamedTuple):
    """How long an example may be, in tokens.

    `drop` leaves an over-long record out.  `keep_start` and `keep_end` say which part of an over-long prompt
    stays; a completion always loses its end.  Where prompt and completion are too long only together,
    `keep_start` cuts the completion and `keep_end` cuts the prompt.  A prompt that loses its start keeps its
    BOS.  A pair's prompt is cut once, for its longer completion, so that both still share it.
    """

    max_length: int  # prompt + completion
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation: str  # drop, keep_start, keep_end
    bos_id: int | None = None

    def apply(self, example: Example, counts: Counter) -> Example | Dropped:
        """Truncates an example to the limits, or drops it.

        Args:
          example: a tokenised record.
          counts: "prompts truncated" and "completions truncated" are added to.
        """
        longest = max((len(c) for c in example.completions), default=0)
        if self.truncation == "drop":
            return self._checked(example, longest)
        prompt, completions = example.prompt, list(example.completions)
        prompt = self._cut_prompt(prompt, self.max_prompt_length)
        if self.max_completion_length is not None:
            longest = min(longest, self.max_completion_length)
        if self.truncation == "keep_end":
            prompt = self._cut_prompt(prompt, max(self.max_length - longest, self._least_prompt(prompt)))
        else:
            prompt = self._cut_prompt(prompt, self.max_length)
        room = self.max_length - len(prompt)
        if self.max_completion_length is not None:
            room = min(room, self.max_completion_length)
        if completions and room <= 0:
            return self._dropped(example, "no room for a completion")
        counts["prompts truncated"] += len(prompt) < len(example.prompt)
        counts["completions truncated"] += sum(len(c) > room for c in completions)
        cut = example._replace(
            prompt=prompt,
            completions=tuple(c[:room] for c in completions),
            masks=tuple(m[:room] for m in example.masks),
            complete=tuple(done and len(c) <= room for done, c in zip(example.complete, completions, strict=True)),
        )
        if not all(mask.any() for mask in cut.masks):
            return self._dropped(example, "no scored token left after truncation")
        if len(completions) == 2 and np.array_equal(cut.completions[0], cut.completions[1]):
            return self._dropped(example, "chosen equals rejected after truncation")
        return cut

    def _least_prompt(self, prompt: np.ndarray) -> int:
        return min(2 if len(prompt) and prompt[0] == self.bos_id else 1, len(prompt))

    def _cut_prompt(self, prompt: np.ndarray, limit: int | None) -> np.ndarray:
        if limit is None or len(prompt) <= limit:
            return prompt
        if self.truncation == "keep_start":
            return prompt[:limit]
        if prompt[0] == self.bos_id and limit > 1:
            return np.concatenate([prompt[:1], prompt[len(prompt) - limit + 1 :]])
        return prompt[len(prompt) - limit :]

    def _checked(self, example: Example, longest: int) -> Example | Dropped:
        if self.max_prompt_length is not None and len(example.prompt) > self.max_prompt_length:
            return self._dropped(example, "prompt longer than max_prompt_length")
        if self.max_completion_length is not None and longest > self.max_completion_length:
            return self._dropped(example, "completion longer than max_completion_length")
        if len(example.prompt) + longest > self.max_length:
            both = "prompt and completion" if example.completions else "prompt and max_new_tokens"
            return self._dropped(example, f"{both} longer than max_length")
        return example

    def _dropped(self, example: Example, reason: str) -> Dropped:
        """Dropped, with the limits that the whole example would need."""
        longest = max((len(c) for c in example.completions), default=0)
        whole = {"max_prompt_length": len(example.prompt), "max_completion_length": longest}
        needs = [("max_length", len(example.prompt) + longest), *whole.items()]
        return Dropped(example.record, reason, tuple((k, n) for k, n in needs if n > (getattr(self, k) or n)))
