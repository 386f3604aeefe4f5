"""Sequence log-probs and reward scores of given completions, in batches.

Sequences of any length go in and numbers come out in the same order.  Between, they are sorted by length into
batches of few shapes: widths are powers of two, rows are what a budget of tokens allows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.models.transformer import Model
from jaxalign.ops.readout import read_hidden, scalar_readout, token_logprobs
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.mesh import batch_shards
from jaxalign.parallel.sharding import put_batch
from jaxalign.types import Array, CausalByIndex, Params, Readouts, Rows

TOKENS_PER_BATCH = 8192  # of a device; the activations of a forward pass over so many are small beside the weights
_NARROWEST = 32  # width of the smallest row


class Tokens(NamedTuple):
    """A prompt and what follows it, as token ids."""

    prompt: Sequence[int]  # at least one: the first completion token is predicted from it
    completion: Sequence[int]  # may be empty
    scored: Sequence[bool] | None = None  # which completion tokens count; None: all


def completion_logprobs(
    model: Model, params: Params, sequences: Sequence[Tokens], mesh: jax.sharding.Mesh
) -> list[float]:
    """Summed log-prob of each completion given its prompt.

        sum_t scored_t log p(completion_t | prompt, completion_<t)

    Args:
      model: with a token head.
      params: its parameters, on `mesh`.
      sequences: prompts and completions.
      mesh: rows are split over its `data` and `fsdp` axes.

    Returns:
      In nats, in the order of `sequences`; 0 for an empty completion.

    Raises:
      ValueError: a prompt without tokens.
    """
    sums, model = [0.0] * len(sequences), _for_all(model, sequences)
    for numbers, rows, readouts in _batches(sequences, mesh, whole=True):
        with jax.set_mesh(mesh):
            logprobs = np.asarray(_logprobs(model, params, *put_batch((rows, readouts), mesh)), np.float64)
        for number, row in zip(numbers, logprobs, strict=False):
            sums[number] = float(row.sum())
    return sums


def final_scores(model: Model, params: Params, sequences: Sequence[Tokens], mesh: jax.sharding.Mesh) -> list[float]:
    """A reward model's score of each sequence, read at its last token.

    Args:
      model: with a scalar head.
      params: its parameters, on `mesh`.
      sequences: prompts and completions, joined; an end-of-sequence token is scored only where it is there.
      mesh: rows are split over its `data` and `fsdp` axes.

    Returns:
      Scores in the order of `sequences`.

    Raises:
      ValueError: a prompt without tokens.
    """
    scores, model = [0.0] * len(sequences), _for_all(model, sequences)
    for numbers, rows, readouts in _batches(sequences, mesh, whole=False):
        with jax.set_mesh(mesh):
            values = np.asarray(_scores(model, params, *put_batch((rows, readouts), mesh)), np.float64)
        for number, row in zip(numbers, values, strict=False):
            scores[number] = float(row[0])
    return scores


def _for_all(model: Model, sequences: Sequence[Tokens]) -> Model:
    """The model for the longest of all sequences, so that none depends on what is in a batch with it."""
    return model.for_length(max((len(s.prompt) + len(s.completion) for s in sequences), default=0))


@functools.partial(jit, static_argnames="model")
def _logprobs(model: Model, params: Params, rows: Rows, readouts: Readouts) -> Array:
    hidden, readouts = read_hidden(model.apply, params, rows, readouts)
    return token_logprobs(hidden, model.head(params), readouts)[0]


@functools.partial(jit, static_argnames="model")
def _scores(model: Model, params: Params, rows: Rows, readouts: Readouts) -> Array:
    hidden, readouts = read_hidden(model.apply, params, rows, readouts)
    return scalar_readout(hidden, model.score_kernel(params), readouts)


def _batches(
    sequences: Sequence[Tokens], mesh: jax.sharding.Mesh, *, whole: bool
) -> Iterator[tuple[list[int], Rows, Readouts]]:
    """Sequences of like width together, as numpy rows; `whole` reads every completion token, else the last token."""
    groups: dict[int, list[int]] = {}
    for number, tokens in enumerate(sequences):
        if not len(tokens.prompt):
            raise ValueError(f"sequence {number} has a prompt without tokens")
        groups.setdefault(_power_of_two(len(tokens.prompt) + len(tokens.completion), _NARROWEST), []).append(number)
    shards = batch_shards(mesh)
    for width, numbers in sorted(groups.items()):
        numbers.sort(key=lambda n: len(sequences[n].completion))  # like with like: fewer places to read out
        most = max(1, TOKENS_PER_BATCH // width) * shards
        height = min(most, -(-_power_of_two(len(numbers), 1) // shards) * shards)
        places = _power_of_two(max(len(sequences[n].completion) for n in numbers), _NARROWEST) if whole else 1
        for start in range(0, len(numbers), height):
            part = numbers[start : start + height]
            yield part, *_rows([sequences[n] for n in part], height, width, places, whole)


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


def _rows(part: Sequence[Tokens], height: int, width: int, places: int, whole: bool) -> tuple[Rows, Readouts]:
    """Right-padded causal rows [height, width]; padding sees itself."""
    index = np.arange(width, dtype=np.int32)
    tokens = np.zeros((height, width), np.int32)
    positions = np.zeros((height, width), np.int32)
    start = np.tile(index, (height, 1))
    end = np.tile(index + 1, (height, 1))
    source, target = (np.zeros((height, places), np.int32) for _ in range(2))
    mask = np.zeros((height, places), bool)
    for i, (prompt, completion, scored) in enumerate(part):
        n = len(prompt) + len(completion)
        tokens[i, :n] = [*prompt, *completion]
        positions[i, :n] = index[:n]
        start[i, :n] = 0
        if whole:
            count = len(completion)
            source[i, :count] = len(prompt) - 1 + index[:count]
            target[i, :count] = completion
            mask[i, :count] = True if scored is None else scored
        else:
            source[i, 0], mask[i, 0] = n - 1, True
    return Rows(tokens, positions, start, end, CausalByIndex()), Readouts(source, target, np.zeros_like(source), mask)
