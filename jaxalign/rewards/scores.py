"""Scores of completions as arrays: named parts, each with a weight, of whole completions or of their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import InputError
from jaxalign.types import Array

# One completion's: a number, a number for each of its tokens, or None where the part does not apply.
Score = float | Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of completions by part."""

    values: Array  # float32 [B, K], of whole completions, 0 where a part does not apply or scores tokens
    applies: Array  # bool [B, K]
    per_token: Array | None  # float32 [B, R, K], of tokens; None where no part scores tokens
    names: tuple[str, ...]  # of the K parts
    weights: tuple[float, ...]  # by which they are added up


jax.tree_util.register_dataclass(Scores, ["values", "applies", "per_token"], ["names", "weights"])


def by_part(said: Sequence[Score] | Mapping[str, Sequence[Score]]) -> dict[str, list[Score]]:
    """A reward's return value as named parts; a plain list is one part."""
    return {name: list(part) for name, part in said.items()} if isinstance(said, Mapping) else {"score": list(said)}


def totals(parts: Mapping[str, Sequence[Score]], weights: Mapping[str, float]) -> list[float | None]:
    """Each completion's score over all parts and tokens, None where no part applies.

    Args:
      parts: by name, N scores each.
      weights: of the parts; 1 for one that is not there.

    >>> totals({"right": [1.0, None], "short": [[0.5, 0.25], None]}, {"short": 2.0})
    [2.5, None]
    """
    found: list[float | None] = []
    for scores in zip(*parts.values(), strict=True):
        there = [
            weights.get(name, 1.0) * float(score if np.ndim(score) == 0 else sum(score))  # type: ignore[arg-type]
            for name, score in zip(parts, scores, strict=True)
            if score is not None
        ]
        found.append(sum(there[1:], there[0]) if there else None)
    return found


def score_arrays(
    parts: Mapping[str, Sequence[Score]], weights: Mapping[str, float], used: np.ndarray, present: np.ndarray
) -> Scores:
    """Scores of this process's completions as numpy arrays.

    Args:
      parts: by name, a score of each used row.
      weights: of the parts; 1 for one that is not there.
      used: bool [B], the rows that hold a completion.
      present: bool [B, R], their tokens.

    Raises:
      InputError: a part that scores tokens, and not each of a completion's.
    """
    rows, names = np.flatnonzero(used), tuple(parts)
    values, applies = np.zeros((len(used), len(names)), np.float32), np.zeros((len(used), len(names)), bool)
    tokens = np.zeros((*present.shape, len(names)), np.float32)
    of_tokens = False
    for k, (name, scores) in enumerate(parts.items()):
        for row, score in zip(rows, scores, strict=True):
            applies[row, k] = score is not None
            if score is None:
                continue
            if np.ndim(score) == 0:
                values[row, k] = score
                continue
            count = int(present[row].sum())
            if len(score) != count:  # type: ignore[arg-type]
                raise InputError(
                    f"the reward's part {name!r} scores {len(score)} tokens of a completion of {count}",  # type: ignore[arg-type]
                    "a score for each of `completion_ids`, or one for the whole completion",
                    f"one number for each token in {name!r}",
                )
            tokens[row, present[row], k], of_tokens = score, True
    return Scores(values, applies, tokens if of_tokens else None, names, tuple(weights.get(n, 1.0) for n in names))


def combine(scores: Scores) -> tuple[Array, Array, Array | None]:
    """The parts added up by their weights; a part counts 0 where it does not apply.

    Args:
      scores: of B completions.

    Returns:
      Scores of whole completions [B], whether any part applies, bool [B], and scores of tokens [B, R] or None.
    """
    chex.assert_rank([scores.values, scores.applies], 2)
    weights = np.asarray(scores.weights, np.float32)
    whole = jnp.sum(jnp.where(scores.applies, scores.values * weights, 0), axis=1)
    applies = jnp.any(scores.applies, axis=1)
    if scores.per_token is None:
        return whole, applies, None
    return whole, applies, jnp.sum(jnp.where(scores.applies[:, None], scores.per_token * weights, 0), axis=2)


def one_part(values: Any, applies: Any) -> Scores:
    """Scores of one part, such as a reward model's, from [B] arrays."""
    return Scores(values[:, None], applies[:, None], None, ("score",), (1.0,))
