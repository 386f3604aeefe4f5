"""Batches of prompts in a few widths: the best ones, the same for every process, counted in the padding."""

import itertools

import jax
import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import from_records
from jaxalign.data.records import Record
from jaxalign.data.widths import MOST, prompt_widths


@pytest.fixture
def build(tmp_path, tokenizer_of, polite_rude):
    """A dataset of prompts, two of them a batch."""

    def _build(like=None, **data):
        config = defaults("ppo")
        config.workdir, config.batch_size = str(tmp_path), 2
        config.data.update(data)
        records = [
            Record(i, "rude.json", i + 1, "prompt", prompt=r["instruction"] * (1 + i % 10 // 4 * i % 7))
            for i, r in enumerate(polite_rude[:60])
        ]
        return from_records(records, config, tokenizer_of("models/stories3m-llama"), like=like)

    return _build


def cost(widths, need, batch_size):
    """Expected columns of a batch, by a loop over how wide its widest prompt may be."""
    total, before = 0.0, 0.0
    for w in sorted(set(need)):
        below = (sum(n <= w for n in need) / len(need)) ** batch_size
        total += (below - before) * next(x for x in widths if x >= w)
        before = below
    return total


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_widths_are_the_best_of_all_choices(seed, batch_size):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(4, 0.8, 300).astype(int) + 1, 290)
    widest = int(-(-lengths.max() // 8) * 8)
    need = [min(-(-int(n) // 32) * 32, widest) for n in lengths]
    inner = sorted(set(need) - {widest})
    best = [
        min(cost((*chosen, widest), need, batch_size) for chosen in itertools.combinations(inner, k))
        for k in range(MOST)
    ]
    got = prompt_widths(lengths, batch_size, widest)
    assert got == tuple(sorted(got)) and got[-1] == widest
    assert cost(got, need, batch_size) == pytest.approx(best[len(got) - 1])
    saved = [1 - after / before for before, after in itertools.pairwise(best)]
    assert all(s > 0.05 for s in saved[: len(got) - 1]) and (len(got) == MOST or saved[len(got) - 1] <= 0.05)


def test_prompts_of_one_length_have_one_width():
    assert prompt_widths(np.full(50, 24), 8, 24) == (24,)
    assert prompt_widths(np.array([7]), 8, 8) == (8,)


def test_batches_are_as_wide_as_they_need(build):
    dataset = build()
    assert 1 < len(dataset.widths) <= MOST and dataset.widths[-1] == dataset.shape.length
    met, tokens, columns = set(), 0, 0
    for i in range(dataset.batches_per_epoch):
        batch = dataset.batch(i)
        longest = max(len(dataset.example(int(r)).prompt) for row in dataset.members(i) for r in row)
        width = batch.rows.tokens.shape[1]
        assert width == min(w for w in dataset.widths if w >= longest)
        parts = [dataset.batch(i, part, 2) for part in range(2)]
        jax.tree.map(lambda whole, *own: np.testing.assert_array_equal(whole, np.concatenate(own)), batch, *parts)
        met, columns = met | {width}, columns + 2 * width
        tokens += sum(len(dataset.example(int(r)).prompt) for row in dataset.members(i) for r in row)
    assert met == set(dataset.widths)
    assert dataset.fill() == pytest.approx(tokens / columns)
    assert dataset.report["rows"]["widths"] == list(dataset.widths)
    assert dataset.report["rows"]["padding_share"] == pytest.approx(1 - tokens / columns, abs=1e-6)


def test_evaluation_takes_the_widths_of_training(build):
    train, shorter = build(), {"max_prompt_length": 32}
    assert build(like=train, **shorter).widths == train.widths != build(**shorter).widths
