"""Batches of random words in the forms that training uses, made by the project's own layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxalign.data.rows import Layout, Shape, build_batch, build_prompts
from jaxalign.data.tokenize import Example


def _example(rng: Any, vocab: int, prompt: int, completions: tuple[int, ...]) -> Example:
    words = lambda n: rng.integers(3, vocab, n).astype(np.int32)  # noqa: E731
    made = tuple(words(n) for n in completions)
    masks = tuple(np.ones(n, bool) for n in completions)
    return Example(0, words(prompt), made, masks, (True,) * len(made), 1.0, 0.0)


def texts(vocab: int, *, rows: int, length: int, parts: int = 1) -> Any:
    """Rows of `parts` packed texts each, of different lengths; every token but a text's first is predicted."""
    rng = np.random.default_rng(0)
    cuts = np.linspace(0, 1, parts + 1) ** 1.3 * length
    sizes = np.diff(cuts.astype(int)).tolist()
    members = [[_example(rng, vocab, 1, (n - 1,)) for n in sizes] for _ in range(rows)]
    return build_batch(members, Shape(rows, length, length, parts), Layout("tokens"), 0)


def pairs(vocab: int, *, rows: int, length: int, prompt: int, shared: bool, readout: str = "tokens") -> Any:
    """A pair in each row: sequences of `length` tokens, `prompt` of them in common."""
    rng = np.random.default_rng(0)
    answer = length - prompt
    members = [[_example(rng, vocab, prompt, (answer, answer))] for _ in range(rows)]
    size = prompt + 2 * answer if shared else 2 * length
    readouts = 2 * answer if readout == "tokens" else 2
    return build_batch(members, Shape(rows, size, readouts, 2), Layout(readout, shared), 0)


def prompts(vocab: int, *, rows: int, length: int) -> Any:
    """Prompts to continue."""
    rng = np.random.default_rng(0)
    return build_prompts([_example(rng, vocab, length, ()) for _ in range(rows)], Shape(rows, length, 0, 1), 0)
