"""The packing plan: which examples share a row, a function of (sizes, seed, epoch)."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np

from jaxalign.data.rows import Sizes

_WINDOW = 16_384  # examples packed together: large enough to fill rows, small enough to mix them anew each epoch
_SLACK = 0.002  # share of rows added to epoch 0's number, which all epochs use
_SAMPLE = 4_096  # examples from which row sizes are chosen
_GOOD_FILL = 0.98
_DRAWS = 24  # random choices looked at before the best of them is taken


class PackingPlan(NamedTuple):
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


def fill_rows(sizes: Sizes, capacity: tuple[int, int, int], seed: int) -> list[list[int]]:
    """Fills rows one by one: random examples, then the one or two that leave the least room.

    Best-fit decreasing uses the long examples up first and is left with short ones that do not fill a row; taking
    examples at random keeps the mixture of lengths until the end.  Only examples longer than half a row, which
    cannot share one, start rows in order of length.  A bit mask of the lengths that are left gives the longest
    that fits in one shift.

    Args:
      sizes: tokens, readouts and completions of each example; each fits a row.
      capacity: tokens, readouts and completions of a row.
      seed: of the random choices.

    Returns:
      Rows of indices into `sizes`; each index once.
    """
    width = capacity[0]
    tokens, readouts, completions = (a.tolist() for a in sizes)
    chance = random.Random(seed)
    order = list(range(len(tokens)))
    chance.shuffle(order)
    by_length: list[list[int]] = [[] for _ in range(width + 1)]
    for i in order:
        by_length[tokens[i]].append(i)
    lengths = sum(1 << length for length, stack in enumerate(by_length) if stack)
    least, mean = min(tokens), sum(tokens) / len(tokens)
    rows: list[list[int]] = []
    room, readouts_left, completions_left = capacity

    def take(length: int) -> None:
        nonlocal lengths, room, readouts_left, completions_left
        i = by_length[length].pop()
        if not by_length[length]:
            lengths &= ~(1 << length)
        rows[-1].append(i)
        room -= length
        readouts_left -= readouts[i]
        completions_left -= completions[i]

    def longest(limit: int) -> int:
        """The greatest length left that is at most `limit`; -1 where there is none."""
        return (lengths & ((2 << limit) - 1)).bit_length() - 1 if limit >= least else -1

    def fits(*items: int) -> bool:
        return (
            sum(readouts[i] for i in items) <= readouts_left and sum(completions[i] for i in items) <= completions_left
        )

    def random_length(limit: int) -> int:
        """The length of a random example, roughly: of the first left in a shuffled order."""
        while order and not by_length[tokens[order[-1]]]:
            order.pop()
        for _ in range(_DRAWS):
            length = tokens[order[int(chance.random() * len(order))]]
            if length <= limit and by_length[length]:
                return length
        return longest(limit)

    while lengths:
        rows.append([])
        room, readouts_left, completions_left = capacity
        top = lengths.bit_length() - 1
        take(top if 2 * top > width else random_length(width))
        while (best := longest(room)) >= 0:
            other = -1
            if not fits(by_length[best][-1]):
                best = -1
            if best < room <= 3 * mean and room >= 2 * least:
                for _ in range(_DRAWS):
                    one = longest(least + int(chance.random() * (room - 2 * least + 1)))
                    two = longest(room - one) if one >= 0 else -1
                    if two < 0 or one + two <= best + max(other, 0) or (one == two and len(by_length[one]) < 2):
                        continue
                    if fits(by_length[one][-1], by_length[two][-1 - (one == two)]):
                        best, other = one, two
                        if one + two == room:
                            break
            filled = best + max(other, 0)
            if filled < room and room > 1.5 * mean:  # no exact fit, and room to try another example first
                drawn = random_length(room)
                if fits(by_length[drawn][-1]):
                    take(drawn)
                    continue
            if best < 0:
                break
            take(best)
            if other >= 0:
                take(other)
    return rows


def _packed(sizes: Sizes, capacity: tuple[int, int, int], order: np.ndarray, seed: int) -> PackingPlan:
    members: list[int] = []
    lengths: list[int] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        for row in fill_rows(Sizes(*(a[window] for a in sizes)), capacity, seed + start):
            members.extend(window[row].tolist())
            lengths.append(len(row))
    return PackingPlan(np.asarray(members, np.int32), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _reordered(plan: PackingPlan, order: np.ndarray) -> PackingPlan:
    """The same rows in another order."""
    counts = np.diff(plan.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(plan.offsets[:-1][order] - offsets[:-1], counts) + np.arange(len(plan.members))
    return PackingPlan(plan.members[places], offsets)


def _split_to(plan: PackingPlan, num_rows: int) -> PackingPlan:
    """Splits the rows with most members in two until there are `num_rows`, where that can be done."""
    while plan.num_rows < num_rows:
        counts = np.diff(plan.offsets)
        chosen = np.argsort(-counts, kind="stable")[: num_rows - plan.num_rows]
        chosen = chosen[counts[chosen] > 1]
        if not len(chosen):
            return plan
        cuts = plan.offsets[chosen] + counts[chosen] // 2
        plan = PackingPlan(plan.members, np.sort(np.concatenate([plan.offsets, cuts])))
    return plan


def plan_epoch(
    sizes: Sizes, capacity: tuple[int, int, int], *, seed: int, epoch: int, shuffle: bool, num_rows: int | None = None
) -> PackingPlan:
    """Packs one epoch.

    Args:
      sizes: what each example takes of a row.
      capacity: tokens, readouts and completions of a row; every example fits.
      seed: of the run.
      epoch: its number; the rows of two epochs have other members.
      shuffle: False orders the rows by their first examples.
      num_rows: give the plan exactly this many rows, by splitting some; see `rows_per_epoch`.

    Returns:
      A plan that holds each example once.
    """
    rng = _generator(seed, epoch)
    order = permutation(len(sizes.tokens), seed, epoch, shuffle)
    plan = _packed(sizes, capacity, order, int(rng.integers(2**62)))
    if num_rows is not None and plan.num_rows > num_rows:  # a rare epoch that packs worse takes the rows of epoch 0
        plan = _packed(
            sizes, capacity, permutation(len(sizes.tokens), seed, 0, shuffle), int(_generator(seed, 0).integers(2**62))
        )
    if shuffle:
        plan = _reordered(plan, rng.permutation(plan.num_rows))
    else:
        plan = _reordered(plan, np.argsort(np.minimum.reduceat(plan.members, plan.offsets[:-1]), kind="stable"))
    return plan if num_rows is None else _split_to(plan, num_rows)


def rows_per_epoch(plan: PackingPlan) -> int:
    """The number of rows of every epoch, from epoch 0's plan.

    Epochs pack a little better or worse; with the same number of rows in each, the batch of an index is found
    without planning the epochs before it.
    """
    return min(plan.num_rows + math.ceil(_SLACK * plan.num_rows), len(plan.members))


def fill(sizes: Sizes, plan: PackingPlan, length: int) -> float:
    """Share of the rows' tokens that are not padding."""
    return float(sizes.tokens.sum() / (plan.num_rows * length)) if plan.num_rows else 0.0


def choose_capacity(sizes: Sizes, row_length: int | None, max_row_length: int, seed: int) -> tuple[int, int, int]:
    """Chooses tokens, readouts and completions of a row: as small as rows still fill well.

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
        rows = fill_rows(tried, (length, readouts, length), seed)
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
