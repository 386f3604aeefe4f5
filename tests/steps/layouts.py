"""Every way to lay the same examples into rows, written as plain loops: an oracle for the invariances."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.types import CHOSEN, REJECTED, SINGLE, Batch, Completions, Readouts, Rows

VOCAB = 32


class Example(NamedTuple):
    prompt: list
    completions: list  # one, or chosen and rejected
    weight: float = 1.0
    score: float = 0.0


def examples(count, completions, *, seed=0, prompt=(1, 6), completion=(1, 7), low=0, vocab=VOCAB, weights=False):
    """Ragged examples of random tokens from `low` on."""
    rng = np.random.default_rng(seed)

    def draw(least, most):
        return rng.integers(low, vocab, rng.integers(least, most + 1)).tolist()

    return [
        Example(
            draw(*prompt),
            [draw(*completion) for _ in range(completions)],
            float(rng.uniform(0.5, 2)) if weights else 1.0,
            float(rng.normal()),
        )
        for _ in range(count)
    ]


def _segments(example, shared):
    """[(tokens, positions, starts, ends, sources, targets, completion numbers, last indices)] of an example."""
    p = len(example.prompt)
    if not shared:
        for number, completion in enumerate(example.completions):
            tokens = example.prompt + completion
            n = len(tokens)
            reads = [(p - 1 + k, t, number) for k, t in enumerate(completion)]
            yield tokens, range(n), [0] * n, range(1, n + 1), reads, [(n - 1, 0, number)]
        return
    chosen, rejected = example.completions
    c, r = len(chosen), len(rejected)
    tokens = chosen[::-1] + example.prompt + rejected
    positions = [p + k for k in reversed(range(c))] + list(range(p + r))
    starts = list(range(c)) + [c] * (p + r)
    ends = [c + p] * c + list(range(c + 1, c + p + r + 1))
    reads = [(c + p - 1 if k == 0 else c - k, t, 0) for k, t in enumerate(chosen)]
    reads += [(c + p - 1 + k, t, 1) for k, t in enumerate(rejected)]
    yield tokens, positions, starts, ends, reads, [(0, 0, 0), (c + p + r - 1, 0, 1)]


def lay(
    rows,
    *,
    scores=False,
    shared=False,
    side="right",
    width=64,
    m=24,
    c=8,
    pad=0,
    num_rows=None,
    dtype=np.float32,
    junk=0,
):
    """Lists of examples, a list for each row, as a Batch.

    Args:
      rows: the packing plan, lists of examples.
      scores: one readout at each completion's last token, instead of one at each token of it.
      shared: reversed(chosen) + prompt + rejected in one segment, instead of a segment for each completion.
      side: of the padding, "left", "right", or how many of it are on the left.
      width, m, c, num_rows: T, M, C and B.
      pad: token id of the padding.
      dtype: of weights, scores and reference log-probs.
      junk: seed of what lies in masked places; 0 for zeros.
    """
    b = num_rows or len(rows)
    rng = np.random.default_rng(junk)

    def fill(shape, high):
        return (rng.integers(0, high, shape) if junk else np.zeros(shape)).astype(np.int32)

    start = np.tile(np.arange(width, dtype=np.int32), (b, 1))
    out = Rows(np.full((b, width), pad, np.int32), fill((b, width), 50), start, start + 1)
    readouts = Readouts(fill((b, m), width), fill((b, m), VOCAB), fill((b, m), c), np.zeros((b, m), bool))
    numbers = (fill((b, c), 9).astype(dtype) for _ in range(3))
    completions = Completions(fill((b, c), c), fill((b, c), 3), *numbers, np.zeros((b, c), bool))
    record_ids = np.full((b, c), -1, np.int32)
    for i, row in enumerate(rows):
        segments = [(e, s) for e in row for s in _segments(e, shared)]
        at = width - sum(len(s[0]) for _, s in segments) if side == "left" else 0 if side == "right" else side
        read, first, done = 0, 0, None
        for example, (tokens, positions, starts, ends, token_reads, score_reads) in segments:
            if done is not None and example is not done:
                first += len(done.completions)
            done = example
            span = slice(at, at + len(tokens))
            out.tokens[i, span], out.positions[i, span] = tokens, positions
            out.attend_start[i, span] = np.asarray(starts) + at
            out.attend_end[i, span] = np.asarray(ends) + at
            for source, target, number in score_reads if scores else token_reads:
                for field, value in zip(readouts, (at + source, target, first + number, True), strict=True):
                    field[i, read] = value
                read += 1
            at += len(tokens)
        first = 0
        for number, example in enumerate(row):
            for k in range(len(example.completions)):
                role = SINGLE if len(example.completions) == 1 else (CHOSEN, REJECTED)[k]
                values = (number, role, example.weight, 0, example.score, True)
                for field, value in zip(completions, values, strict=True):
                    field[i, first + k] = value
                record_ids[i, first + k] = number
            first += len(example.completions)
    return Batch(out, readouts, completions, record_ids)


def tiny_model(head="lm", dtype="float64", remat="none", **fields):
    """A Llama of two layers, untied, grouped heads."""
    hf = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    } | fields
    return Model(from_hf(hf, dtype=dtype, param_dtype=dtype, remat=remat, head=head))


def perturbed(params, scale=0.05, seed=1):
    """The parameters, each moved by noise of a stated share of its tensor's root mean square."""
    rng = np.random.default_rng(seed)

    def move(x):
        return jnp.asarray(x + scale * np.sqrt(np.mean(np.square(x))) * rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(move, params)
