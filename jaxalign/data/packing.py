"""The packing plan: which examples share a row, a function of (sizes, seed, epoch)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxalign.data.rows import Sizes

_WINDOW = 16_384  # examples packed together: large enough to fill rows, small enough to mix them anew each epoch
_SLACK = 0.002  # rows beyond epoch 0's, so that every epoch has the same number
_SAMPLE = 4_096  # examples that capacities are chosen on
_GOOD_FILL = 0.98
_TRIES = 256  # open rows looked at, from the fullest that fits, before a new one is opened


class Plan(NamedTuple):
    """Rows of examples: row r holds `members[offsets[r] : offsets[r + 1]]`."""

    members: np.ndarray  # int32 [N], each example once
    offsets: np.ndarray  # int64 [rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, r: int) -> np.ndarray:
        """The examples of row r."""
        return self.members[self.offsets[r] : self.offsets[r + 1]]


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), epoch]))


def permutation(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int32 [n]: the order of an epoch."""
    if not shuffle:
        return np.arange(n, dtype=np.int32)
    return _generator(seed, epoch).permutation(n).astype(np.int32)


def best_fit(sizes: Sizes, capacity: tuple[int, int, int]) -> list[list[int]]:
    """Best-fit decreasing: each example goes to the fullest open row that has room for it.

    Open rows are kept in stacks by the tokens they have left, and a bit mask says which stacks hold a row, so
    the fullest row that fits is found by one shift.

    Args:
      sizes: tokens, readouts and completions of each example.
      capacity: tokens, readouts and completions of a row.

    Returns:
      Rows of indices into `sizes`.
    """
    most_tokens, most_readouts, most_completions = capacity
    tokens, readouts, completions = (a.tolist() for a in sizes)
    rows: list[list[int]] = []
    readouts_left: list[int] = []
    completions_left: list[int] = []
    stacks: list[list[int]] = [[] for _ in range(most_tokens + 1)]
    occupied = 0
    for i in np.argsort(-sizes.tokens, kind="stable").tolist():
        need, reads, slots = tokens[i], readouts[i], completions[i]
        found, free, tries = -1, 0, 0
        candidates = occupied >> need
        while candidates and tries < _TRIES:
            step = candidates & -candidates
            free = need + step.bit_length() - 1
            row = stacks[free][-1]
            if readouts_left[row] >= reads and completions_left[row] >= slots:
                found = row
                break
            candidates ^= step
            tries += 1
        if found < 0:
            rows.append([i])
            readouts_left.append(most_readouts - reads)
            completions_left.append(most_completions - slots)
            found, free = len(rows) - 1, most_tokens
        else:
            stacks[free].pop()
            if not stacks[free]:
                occupied &= ~(1 << free)
            rows[found].append(i)
            readouts_left[found] -= reads
            completions_left[found] -= slots
        left = free - need
        if completions_left[found] and left:
            stacks[left].append(found)
            occupied |= 1 << left
    return rows


def _packed(sizes: Sizes, capacity: tuple[int, int, int], order: np.ndarray, rng: np.random.Generator | None) -> Plan:
    members: list[int] = []
    lengths: list[int] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        for row in best_fit(Sizes(*(a[window] for a in sizes)), capacity):
            members.extend(window[row].tolist())
            lengths.append(len(row))
    plan = Plan(np.asarray(members, np.int32), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    return plan if rng is None else _reordered(plan, rng.permutation(plan.num_rows))


def _reordered(plan: Plan, order: np.ndarray) -> Plan:
    """The same rows in another order."""
    counts = np.diff(plan.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(plan.offsets[:-1][order] - offsets[:-1], counts) + np.arange(len(plan.members))
    return Plan(plan.members[places], offsets)


def _split_to(plan: Plan, num_rows: int) -> Plan:
    """Splits the rows with most members in two until there are `num_rows`, where that can be done."""
    while plan.num_rows < num_rows:
        counts = np.diff(plan.offsets)
        chosen = np.argsort(-counts, kind="stable")[: num_rows - plan.num_rows]
        chosen = chosen[counts[chosen] > 1]
        if not len(chosen):
            return plan
        cuts = plan.offsets[chosen] + counts[chosen] // 2
        plan = Plan(plan.members, np.sort(np.concatenate([plan.offsets, cuts])))
    return plan


def plan_epoch(
    sizes: Sizes, capacity: tuple[int, int, int], *, seed: int, epoch: int, shuffle: bool, num_rows: int | None = None
) -> Plan:
    """Packs one epoch.

    Args:
      sizes: what each example takes of a row.
      capacity: tokens, readouts and completions of a row; every example fits.
      seed: of the run.
      epoch: its number; the rows of two epochs have other members.
      shuffle: False keeps the examples' order apart from what packing moves.
      num_rows: give the plan exactly this many rows, by splitting some; see `rows_per_epoch`.

    Returns:
      A plan that holds each example once.
    """
    rng = _generator(seed, epoch) if shuffle else None
    n = len(sizes.tokens)
    order = rng.permutation(n) if rng is not None else np.arange(n)
    plan = _packed(sizes, capacity, order, rng)
    if num_rows is None:
        return plan
    if plan.num_rows > num_rows:  # a rare epoch that packs worse: epoch 0's rows in another order
        plan = plan_epoch(sizes, capacity, seed=seed, epoch=0, shuffle=shuffle)
        plan = plan if rng is None else _reordered(plan, rng.permutation(plan.num_rows))
    return _split_to(plan, num_rows)


def rows_per_epoch(plan: Plan) -> int:
    """A number of rows that other epochs can be given too, from epoch 0's plan.

    Epochs pack a little better or worse; with the same number of rows in each, the batch of an index is found
    without planning the epochs before it.
    """
    return min(plan.num_rows + math.ceil(_SLACK * plan.num_rows), len(plan.members))


def fill(sizes: Sizes, plan: Plan, length: int) -> float:
    """Share of the rows' tokens that are not padding."""
    return float(sizes.tokens.sum() / (plan.num_rows * length)) if plan.num_rows else 0.0


def choose_capacity(sizes: Sizes, row_length: int | None, max_row_length: int, seed: int) -> tuple[int, int, int]:
    """Tokens, readouts and completions of a row, as small as they may be where rows still fill well.

    Args:
      sizes: what each example takes.
      row_length: tokens of a row where the configuration says so.
      max_row_length: the most tokens a row may have.
      seed: of the sample that is tried.

    Returns:
      The shortest row (a multiple of 64) that fills to 98 %, or fills best; then the fewest readouts that cost it
      less than half a percent; room for completions beyond what rows of the sample hold.
    """
    most = [int(a.max()) for a in sizes]
    sample = np.sort(permutation(len(sizes.tokens), seed, 0, True)[:_SAMPLE])
    tried = Sizes(*(a[sample] for a in sizes))

    def attempt(length: int, readouts: int) -> tuple[float, list[list[int]]]:
        rows = best_fit(tried, (length, readouts, length))
        return float(tried.tokens.sum() / (len(rows) * length)), rows

    if row_length is None:
        shortest = -(-most[0] // 64) * 64
        lengths = sorted({min(int(shortest * k), max_row_length) for k in (1, 1.5, 2, 3, 4, 6, 8, 12, 16)})
        lengths = sorted({min(-(-n // 64) * 64, max_row_length) for n in lengths})
        fills = []
        for length in lengths:
            fills.append(attempt(length, length)[0])
            if fills[-1] >= _GOOD_FILL:
                break
        row_length = lengths[int(np.argmax(fills))]
    best, rows = attempt(row_length, row_length)
    # Readouts: from the share of tokens that are read, upwards.
    step = max(row_length // 16 // 8 * 8, 8)
    share = tried.readouts.sum() / max(tried.tokens.sum(), 1)
    readouts = max(-(-int(share * row_length) // step) * step, -(-most[1] // 8) * 8)
    while readouts < row_length:
        reached, rows = attempt(row_length, readouts)
        if reached >= best - 0.005:
            break
        readouts += step
    readouts = min(readouts, row_length)
    slots = max(int(tried.completions[row].sum()) for row in rows)
    return row_length, readouts, max(-(-slots * 5 // 4) // 2 * 2 + 2, most[2])
