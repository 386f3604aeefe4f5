"""The vectors of tokens that a model is given beside its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MULTIPLE = 64  # of a vocabulary that was made larger, so that meshes still divide it
_CHUNK = 1024  # rows that are added up at a time


@dataclasses.dataclass(frozen=True)
class Added:
    """Tokens that a checkpoint has no vectors of: each starts as the mean of those of its tokens.

    Their logits then are the mean of the other tokens' logits, and a softmax gives each of them less than an average
    token has (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """

    rows: int  # of the checkpoint's vocabulary
    ids: tuple[int, ...]  # of the tokens, ascending; those below `rows` are rows that no token had
    known: tuple[tuple[int, int], ...]  # ranges of the ids of tokens that have vectors: first, one past the last

    @property
    def vocab_size(self) -> int:
        """Rows with these tokens: as before where they suffice, else the next multiple of `MULTIPLE`.

        >>> Added(64, (60,), ((0, 60),)).vocab_size, Added(100, (99, 100), ((0, 99),)).vocab_size
        (64, 128)
        """
        return self.rows if self.ids[-1] < self.rows else -(-(self.ids[-1] + 1) // MULTIPLE) * MULTIPLE

    def mean(self, table: np.ndarray) -> np.ndarray:
        """The mean vector of the tokens that have one: a sum in float64, in the order of ids, rounded to float32.

        Args:
          table: [rows, D]; it is read once, in chunks.
        """
        total = np.zeros(table.shape[1:], np.float64)
        for first, end in self.known:
            for start in range(first, end, _CHUNK):
                total += table[start : min(start + _CHUNK, end)].astype(np.float64).sum(0)
        return (total / sum(end - first for first, end in self.known)).astype(np.float32)

    def vectors(self, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Those of some tokens in the larger table, as `write` fills it.

        Args:
          table: the checkpoint's [rows, D].
          ids: of the tokens, [n].
        """
        mean = self.mean(table)
        found = np.empty((len(ids), *mean.shape), np.promote_types(table.dtype, np.float32))
        there = (ids < self.rows) & ~np.isin(ids, self.ids)
        found[there], found[~there] = table[ids[there]], mean
        return found

    def write(self, out: np.ndarray, table: np.ndarray, within: Sequence[slice], mean: np.ndarray) -> None:
        """Fills a part of the larger table; rows that no token has are the mean too.

        Args:
          out: the part, [end - start, ...].
          table: the checkpoint's [rows, D].
          within: which part, of a table [vocab_size, D].
          mean: as `mean` gives it, [D].
        """
        (start, end), columns = (within[0].start, within[0].stop), within[1]
        kept = max(0, min(end, self.rows) - start)
        out[:kept] = table[start : start + kept, columns]
        for i in (*self.ids, *range(self.rows, self.vocab_size)):
            if start <= i < end:
                out[i - start] = mean[columns]
