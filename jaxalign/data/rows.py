"""Examples to rows: tokens, positions, attention intervals and readouts.

A segment is the tokens of one example inside a row.  A shared-prompt pair is laid out as
`reversed(chosen) + prompt + rejected`:

    index      0 ... Rc-1   |  Rc ... Rc+P-1  |  Rc+P ... Rc+P+Rr-1
    token      chosen, last |  prompt, first  |  rejected, first
               token first  |  token first    |  token first
    sees       itself up to |  prompt start   |  prompt start
               prompt's end |  up to itself   |  up to itself
    position   P + Rc-1 - i |  i - Rc         |  i - Rc

so every token's visible keys are one interval, the prompt is computed once, and the result is that of two
separate sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.data.tokenize import Example
from jaxalign.types import (
    CHOSEN,
    REJECTED,
    SINGLE,
    Batch,
    CausalByIndex,
    CausalByPosition,
    Completions,
    Readouts,
    Rows,
)


class Shape(NamedTuple):
    """The static sizes of a batch."""

    rows: int  # B
    length: int  # T, tokens of a row
    readouts: int  # M, readouts of a row
    completions: int  # C, completions of a row


class Layout(NamedTuple):
    """How examples become segments.

    readout: "tokens" reads a log-prob at every scored completion token, "last" one score at each completion's
      last token, "none" nothing (prompts to sample from).
    shared_prompt: whether a pair shares its prompt, or is two causal segments in the same row.
    """

    readout: str
    shared_prompt: bool = True

    @property
    def causal(self) -> CausalByIndex | CausalByPosition:
        """The layout promises of rows of such segments."""
        return CausalByPosition() if self.shared_prompt and self.readout != "none" else CausalByIndex()


class Segment(NamedTuple):
    """One example in a row; indices are relative to its start."""

    tokens: np.ndarray  # int32 [N]
    positions: np.ndarray  # int32 [N]
    attend_start: np.ndarray  # int32 [N]
    attend_end: np.ndarray  # int32 [N]
    source: np.ndarray  # int32 [K]
    target: np.ndarray  # int32 [K]
    completion: np.ndarray  # int32 [K], 0 or 1


class Sizes(NamedTuple):
    """Sizes of examples in a row: int64 [N] each."""

    tokens: np.ndarray
    readouts: np.ndarray
    completions: np.ndarray


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is at least n.

    >>> round_up(65, 64)
    128
    """
    return -(-n // multiple) * multiple


def segment_tokens(
    prompt: np.ndarray | int, completions: Sequence[np.ndarray | int], shared_prompt: bool
) -> np.ndarray:
    """Tokens that examples take in a row, from their lengths.

    Args:
      prompt: int [N] or [], prompt lengths.
      completions: one of the same shape for each completion slot (0, 1 or 2 of them).
      shared_prompt: see Layout.
    """
    total = np.asarray(prompt, np.int64) + sum(np.asarray(c, np.int64) for c in completions)
    return total + np.asarray(prompt, np.int64) if len(completions) == 2 and not shared_prompt else total


def segment(example: Example, layout: Layout) -> Segment:
    """Lays one example out.

    Args:
      example: P prompt tokens, at least one, and completions of at least one token each.
      layout: how.

    Returns:
      Its tokens, positions, intervals and readouts.
    """
    prompt_length = len(example.prompt)
    if len(example.completions) == 2 and layout.shared_prompt:
        chosen, rejected = example.completions
        shared_start, shared_end = len(chosen), len(chosen) + prompt_length
        index = np.arange(shared_end + len(rejected), dtype=np.int32)
        is_chosen = index < shared_start
        tokens = np.concatenate([chosen[::-1], example.prompt, rejected])
        # A chosen token at index i has chosen token number Rc-1-i, hence position P + Rc-1-i.
        positions = np.where(is_chosen, shared_end - 1 - index, index - shared_start)
        start = np.where(is_chosen, index, shared_start)
        end = np.where(is_chosen, shared_end, index + 1)
        # The hidden state that predicts a token is its predecessor's: for chosen tokens the next index.
        places = [np.arange(shared_start - 1, -1, -1), np.arange(len(rejected)) + shared_end]
        sources = [places[0] + 1, places[1] - 1]
        sources[0][:1] = shared_end - 1
    else:
        pieces = [np.concatenate([example.prompt, c]) for c in example.completions] or [example.prompt]
        offsets = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int32)
        tokens = np.concatenate(pieces)
        index = np.arange(len(tokens), dtype=np.int32)
        start = np.repeat(offsets[:-1], np.diff(offsets))
        positions, end = index - start, index + 1
        places = [
            np.arange(len(c)) + offset + prompt_length for c, offset in zip(example.completions, offsets, strict=False)
        ]
        sources = [place - 1 for place in places]

    source, target, completion = [], [], []
    for number, (place, before) in enumerate(zip(places, sources, strict=True)):
        if layout.readout == "tokens":
            mask = example.masks[number]
            source.append(before[mask])
            target.append(example.completions[number][mask])
        elif layout.readout == "last":
            source.append(place[-1:])
            target.append(np.zeros(1, np.int32))
        else:
            continue
        completion.append(np.full(len(source[-1]), number))
    return Segment(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        start.astype(np.int32),
        end.astype(np.int32),
        *(np.concatenate([*values, []]).astype(np.int32) for values in (source, target, completion)),
    )


def empty_batch(shape: Shape, pad_id: int) -> Batch:
    """A batch of padding: every token sees itself alone, every mask is False."""
    b, t, m, c = shape
    index = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    return Batch(
        Rows(np.full((b, t), pad_id, np.int32), np.zeros((b, t), np.int32), index.copy(), index + 1, CausalByIndex()),
        Readouts(
            source=np.zeros((b, m), np.int32),
            target=np.zeros((b, m), np.int32),
            completion=np.zeros((b, m), np.int32),
            mask=np.zeros((b, m), bool),
        ),
        Completions(
            pair=np.zeros((b, c), np.int32),
            role=np.full((b, c), SINGLE, np.int32),
            weight=np.zeros((b, c), np.float32),
            ref_logprob=np.zeros((b, c), np.float32),
            score=np.zeros((b, c), np.float32),
            mask=np.zeros((b, c), bool),
        ),
        np.full((b, c), -1, np.int32),
    )


def build_batch(rows: Sequence[Sequence[Example]], shape: Shape, layout: Layout, pad_id: int) -> Batch:
    """Rows of examples as a batch; rows beyond the given ones are padding.

    Args:
      rows: at most `shape.rows` lists of examples.
      shape: the static sizes.
      layout: how examples become segments.
      pad_id: the token of padding; any id gives the same results.

    Returns:
      numpy arrays; readouts are ordered by completion, then by token.

    Raises:
      ValueError: where a row does not fit, naming the record.
    """
    batch = empty_batch(shape, pad_id)
    batch = batch._replace(rows=batch.rows._replace(causal=layout.causal))
    for b, examples in enumerate(rows):
        token = readout = slot = 0
        for pair, example in enumerate(examples):
            part = segment(example, layout)
            count = max(len(example.completions), 1)
            ends = (token + len(part.tokens), readout + len(part.source), slot + count)
            if any(end > size for end, size in zip(ends, shape[1:], strict=True)):
                raise ValueError(
                    f"record {example.record} ends at token, readout, completion {ends} of a row that holds {shape[1:]}"
                )
            here = (b, slice(token, ends[0]))
            batch.rows.tokens[here] = part.tokens
            batch.rows.positions[here] = part.positions
            batch.rows.attend_start[here] = part.attend_start + token
            batch.rows.attend_end[here] = part.attend_end + token
            here = (b, slice(readout, ends[1]))
            batch.readouts.source[here] = part.source + token
            batch.readouts.target[here] = part.target
            batch.readouts.completion[here] = part.completion + slot
            batch.readouts.mask[here] = True
            here = (b, slice(slot, ends[2]))
            batch.completions.pair[here] = pair
            batch.completions.role[here] = (CHOSEN, REJECTED) if count == 2 else SINGLE
            batch.completions.weight[here] = example.weight
            batch.completions.score[here] = example.score
            batch.completions.mask[here] = True
            batch.record_ids[here] = example.record
            token, readout, slot = ends
    return batch


def build_prompts(examples: Sequence[Example], shape: Shape, pad_id: int) -> Batch:
    """Prompts to sample from: left-padded rows [B, P], one completion slot each, no readouts.

    Raises:
      ValueError: where a prompt does not fit, naming the record.
    """
    batch = empty_batch(shape, pad_id)
    for b, example in enumerate(examples):
        start = shape.length - len(example.prompt)
        if start < 0:
            raise ValueError(f"record {example.record} has {len(example.prompt)} prompt tokens for {shape.length}")
        batch.rows.tokens[b, start:] = example.prompt
        batch.rows.positions[b, start:] = np.arange(len(example.prompt))
        batch.rows.attend_start[b, start:] = start
        batch.completions.weight[b, 0] = example.weight
        batch.completions.score[b, 0] = example.score
        batch.completions.mask[b, 0] = True
        batch.record_ids[b, 0] = example.record
    return batch
