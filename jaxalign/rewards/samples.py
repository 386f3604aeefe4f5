"""The input of a reward, and the type of every reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Samples(NamedTuple):
    """Completions to be scored, one entry per completion in every field."""

    prompts: Sequence[Any]  # as they stand in the data: a string, or a list of messages
    completions: Sequence[str]  # text, without special tokens
    completion_ids: Sequence[Sequence[int]]  # the policy's tokens, the stop token included
    finished: Sequence[bool]  # ended by a stop token
    records: Sequence[Any]  # the data's records (`jaxalign.data.records.Record`)
    step: int  # optimizer updates made so far


class Scorer(Protocol):
    """A reward: from completions to one number each, or None where it does not apply.

    One of several parts gives such a list for each of their names, in which a completion may have a number for each of
    its tokens too.
    """

    def __call__(self, samples: Samples) -> Any: ...
