"""Row lengths of prompt batches: few, to compile few programs, but several, to pad short prompts less."""

from __future__ import annotations

import numpy as np

MOST = 3  # widths of a run: each is a program to compile
_MULTIPLE = 32
_WORTH = 0.05  # one more width must save this share of the tokens


def prompt_widths(lengths: np.ndarray, batch_size: int, widest: int) -> tuple[int, ...]:
    """The widths at which batches of prompts cost least.

        cost = sum_k w_k (F(w_k)^B - F(w_(k-1))^B)        F: the share of prompts that are no longer

    since a batch is as wide as its longest prompt asks.

    Args:
      lengths: int [N], of the prompts.
      batch_size: B, prompts of a batch, drawn at random.
      widest: the last width; no prompt is longer.

    Returns:
      At most `MOST`, ascending.

    >>> prompt_widths(np.array([20] * 990 + [200] * 10), 4, 200)
    (32, 200)
    """
    need = np.minimum(-(-np.asarray(lengths) // _MULTIPLE) * _MULTIPLE, widest)
    widths = np.union1d(need, [widest])
    share = np.searchsorted(np.sort(need), widths, side="right") / max(len(need), 1)
    below = np.concatenate([[0.0], share**batch_size])  # probability that a batch fits the width before
    # best[j]: least cost of the batches up to width j, if j is the last chosen width.
    best = widths * below[1:]
    chosen: list[tuple[int, ...]] = [(j,) for j in range(len(widths))]
    least, found = best[-1], chosen[-1]
    for _ in range(MOST - 1):
        options = [best[:j] + widths[j] * (below[j + 1] - below[1 : j + 1]) for j in range(len(widths))]
        last = [int(np.argmin(o)) if len(o) else -1 for o in options]
        best = np.array([o[i] if i >= 0 else np.inf for o, i in zip(options, last, strict=True)])
        chosen = [(*chosen[i], j) if i >= 0 else (j,) for j, i in enumerate(last)]
        if not best[-1] < (1 - _WORTH) * least:
            break
        least, found = best[-1], chosen[-1]
    return tuple(int(widths[j]) for j in found)


def width_of(longest: int, widths: tuple[int, ...]) -> int:
    """The smallest width that fits.

    >>> width_of(33, (32, 64, 200))
    64
    """
    return next(w for w in widths if w >= longest)
