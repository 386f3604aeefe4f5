"""Checks what rows promise of their layout: attention skips keys that a promise says nobody sees."""

from __future__ import annotations

import numpy as np

from jaxalign.types import CausalByIndex, CausalByPosition, Rows


def check_layout(rows: Rows) -> None:
    """Checks that rows are laid out as they promise.

    Args:
      rows: [B, T] of numpy arrays.

    Raises:
      ValueError: an interval that is empty or leaves the row, or a token that sees one which the promise rules out;
        naming the first.

    >>> check_layout(Rows(*np.array([[[5, 6]], [[0, 1]], [[0, 0]], [[2, 2]]]), causal=CausalByIndex()))
    Traceback (most recent call last):
    ValueError: token 0 of row 0 sees tokens 0 to 1, and its rows promise CausalByIndex
    """
    start, end, positions = (np.asarray(x) for x in (rows.attend_start, rows.attend_end, rows.positions))
    length = start.shape[1]
    _refuse((start < 0) | (start >= end) | (end > length), rows, "which is no interval of the row")
    index = np.arange(length)
    if isinstance(rows.causal, CausalByIndex):
        _refuse(end > index + 1, rows, "and its rows promise CausalByIndex")
        # How often positions have jumped up to each token: as often at the first that it sees as at itself.
        jumps = np.cumsum(np.diff(positions - index, axis=1, prepend=positions[:, :1]) != 0, axis=1)
        jumped = np.take_along_axis(jumps, start, axis=1) != jumps
        _refuse(jumped, rows, "whose positions do not count up with the index, and its rows promise CausalByIndex")
    if isinstance(rows.causal, CausalByPosition):
        for b in range(len(start)):
            seen = (index >= start[b, :, None]) & (index < end[b, :, None]) & (index != index[:, None])
            later = (seen & (positions[b] >= positions[b, :, None])).any(-1)
            _refuse(later[None], rows, "and its rows promise CausalByPosition", b)


def _refuse(wrong: np.ndarray, rows: Rows, why: str, first: int = 0) -> None:
    if wrong.any():
        b, t = (int(i) for i in np.argwhere(wrong)[0])
        b += first
        seen = f"{rows.attend_start[b][t]} to {rows.attend_end[b][t] - 1}"
        raise ValueError(f"token {t} of row {b} sees tokens {seen}, {why}")
