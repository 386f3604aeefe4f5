"""The packing plan: every example once, within capacity, full rows, the same rows for the same (sizes, seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.packing import choose_capacity, fill, fill_rows, permutation, plan_epoch, rows_per_epoch
from jaxalign.data.rows import Sizes


def _sizes(tokens, readouts=None, completions=None):
    tokens = np.asarray(tokens, np.int64)
    readouts = tokens // 2 if readouts is None else np.asarray(readouts, np.int64)
    return Sizes(tokens, readouts, np.ones_like(tokens) if completions is None else np.asarray(completions, np.int64))


def _check(rows, sizes, capacity):
    assert sorted(i for row in rows for i in row) == list(range(len(sizes.tokens)))
    for row in rows:
        assert all(int(a[list(row)].sum()) <= most for a, most in zip(sizes, capacity, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1), st.integers(1, 2)), min_size=1, max_size=60),
    st.integers(20, 50),
    st.integers(20, 40),
    st.integers(2, 6),
    st.integers(0, 3),
)
def test_rows_hold_everything_within_three_capacities(items, tokens, readouts, completions, seed):
    sizes = _sizes([t for t, _, _ in items], [int(t * share) for t, share, _ in items], [c for _, _, c in items])
    capacity = (tokens, readouts, completions)
    rows = fill_rows(sizes, capacity, seed)
    _check(rows, sizes, capacity)
    assert rows == fill_rows(sizes, capacity, seed)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(0, 2**63), st.integers(0, 5), st.booleans())
def test_plans_of_all_epochs_have_the_same_number_of_rows(tokens, seed, epoch, shuffle):
    sizes, capacity = _sizes(tokens), (32, 32, 8)
    first = plan_epoch(sizes, capacity, seed=seed, epoch=0, shuffle=shuffle)
    number = rows_per_epoch(first)
    for e in (0, epoch):
        plan = plan_epoch(sizes, capacity, seed=seed, epoch=e, shuffle=shuffle, num_rows=number)
        assert plan.num_rows == number
        _check([plan.row(r).tolist() for r in range(plan.num_rows)], sizes, capacity)
        again = plan_epoch(sizes, capacity, seed=seed, epoch=e, shuffle=shuffle, num_rows=number)
        assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


def test_epochs_differ_in_order_and_in_who_shares_a_row():
    sizes = _sizes(np.random.default_rng(0).integers(5, 60, 500))
    plans = [plan_epoch(sizes, (256, 256, 64), seed=1, epoch=e, shuffle=True) for e in (0, 1)]
    rows = [{tuple(sorted(p.row(r).tolist())) for r in range(p.num_rows)} for p in plans]
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[0])
    assert not np.array_equal(permutation(500, 1, 0, True), permutation(500, 1, 1, True))
    assert not np.array_equal(permutation(500, 1, 0, True), permutation(500, 2, 0, True))
    assert np.array_equal(permutation(5, 1, 0, False), np.arange(5))


@pytest.mark.parametrize("mean, width, scored", [(200, 1024, 0.9), (100, 512, 0.5), (400, 4096, 0.3)])
def test_rows_are_full_under_tight_readouts(mean, width, scored):
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(np.log(mean), 0.6, 5000).astype(int), 2, width // 3)
    sizes = _sizes(tokens, np.maximum((tokens * rng.uniform(0.5 * scored, scored, 5000)).astype(int), 1))
    capacity = choose_capacity(sizes, width, width, seed=0)
    plan = plan_epoch(sizes, capacity, seed=0, epoch=3, shuffle=True)
    assert fill(sizes, plan, width) >= 0.98
    assert capacity[1] <= round(width * scored)  # not one readout for every token


def test_the_row_is_no_longer_than_it_must_be():
    rng = np.random.default_rng(0)
    sizes = _sizes(rng.integers(3, 60, 2000))
    length, _, _ = choose_capacity(sizes, None, 4096, seed=0)
    assert length <= 192
    assert choose_capacity(_sizes(np.full(100, 63)), None, 4096, seed=0)[0] == 64
    assert choose_capacity(_sizes(rng.integers(3, 40, 100)), None, 40, seed=0)[0] == 40


def test_a_plan_of_a_hundred_thousand_takes_a_few_seconds():
    import time

    tokens = np.clip(np.random.default_rng(0).lognormal(5.3, 0.7, 100_000).astype(int), 2, 1024)
    sizes, start = _sizes(tokens), time.process_time()
    plan = plan_epoch(sizes, (1024, 1024, 64), seed=0, epoch=0, shuffle=True)
    assert time.process_time() - start < 8
    assert fill(sizes, plan, 1024) > 0.99
