"""An independent judge: logistic regression over bags of words, in numpy."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"[a-z']+")
_RARE = 5  # words of fewer texts are left out
_STEPS, _RATE, _DECAY = 80, 0.1, (0.9, 0.99)  # of Adam, over all texts at once
_PENALTY = 1e-4  # L2, of the weights


class WordBag(NamedTuple):
    """P(label 1) = sigmoid(bias + sum of the weights of the distinct words in a text)."""

    words: dict[str, int]  # word -> place in weights
    weights: np.ndarray  # float64 [words]
    bias: float

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Log-odds of label 1 of each text.

        >>> bag = WordBag({"good": 0, "bad": 1}, np.array([2.0, -3.0]), 0.5)
        >>> bag.scores(["Good, good!", "bad", "neither"])
        [2.5, -2.5, 0.5]
        """
        found = (bag(text) for text in texts)
        return [self.bias + float(sum(self.weights[self.words[w]] for w in b if w in self.words)) for b in found]

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file."""
        np.savez(path, words=np.array(list(self.words)), weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: str | os.PathLike) -> WordBag:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            return cls({str(w): i for i, w in enumerate(file["words"])}, file["weights"], float(file["bias"]))


def bag(text: str) -> list[str]:
    """The different words of a text, sorted.

    >>> bag("Not good. NOT bad!")
    ['bad', 'good', 'not']
    """
    return sorted(set(_WORD.findall(text.lower())))


def fit(texts: Sequence[str], labels: Sequence[int]) -> WordBag:
    """Fits logistic regression by full-batch Adam, deterministically.

        mean over texts of log(1 + exp(-s z)) + penalty / 2 |weights|^2,  s = 1 or -1 by label, z = log-odds

    Args:
      texts: of both labels.
      labels: 0 or 1 each.

    Returns:
      The classifier.

    Raises:
      ValueError: texts of one label only.
    """
    if set(labels) != {0, 1}:
        raise ValueError(f"labels {sorted(set(labels))}, not 0 and 1")
    bags = [bag(text) for text in texts]
    counts = Counter(word for words in bags for word in words)
    words = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= _RARE))}
    places = [[words[w] for w in b if w in words] for b in bags]
    place = np.array([p for row in places for p in row], np.int64)
    text = np.repeat(np.arange(len(texts)), [len(row) for row in places])
    wanted, count = np.asarray(labels, np.float64), len(texts)
    weights = np.zeros(len(words) + 1)  # the bias is the last
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, _STEPS + 1):
        odds = np.bincount(text, weights[place], count) + weights[-1]
        error = (1 / (1 + np.exp(-odds)) - wanted) / count
        slope = np.append(np.bincount(place, error[text], len(words)) + _PENALTY * weights[:-1], error.sum())
        mean = _DECAY[0] * mean + (1 - _DECAY[0]) * slope
        square = _DECAY[1] * square + (1 - _DECAY[1]) * slope**2
        size = np.sqrt(square / (1 - _DECAY[1] ** step)) + 1e-12
        weights -= _RATE * (1 - step / (_STEPS + 1)) * mean / (1 - _DECAY[0] ** step) / size
    return WordBag(words, weights[:-1], float(weights[-1]))


def accuracy(judge: WordBag, texts: Sequence[str], labels: Sequence[int]) -> float:
    """The judge's accuracy, from 0 to 1."""
    told = [score > 0 for score in judge.scores(texts)]
    return float(np.mean([a == bool(b) for a, b in zip(told, labels, strict=True)]))
