"""Rows against an oracle that lists, token by token, what a completion's tokens may see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.rows import Layout, Shape, Sizes, build_batch, build_prompts, round_up, segment, segment_tokens
from jaxalign.data.tokenize import Example
from jaxalign.types import CHOSEN, REJECTED, SINGLE


def _example(number, prompt, *completions):
    rng = np.random.default_rng([number, prompt, *completions])
    masks = tuple(rng.random(n) < 0.7 for n in completions)
    for mask in masks:
        mask[-1] = True  # what ends a completion is scored
    ids = [rng.integers(0, 50, n).astype(np.int32) for n in (prompt, *completions)]
    return Example(number, ids[0], tuple(ids[1:]), masks, (True,) * len(completions), 1.0 + number, 0.5 * number)


def _sizes(examples, layout):
    parts = [segment(e, layout) for e in examples]
    counts = [max(len(e.completions), 1) for e in examples]
    return Sizes(np.array([len(p.tokens) for p in parts]), np.array([len(p.source) for p in parts]), np.array(counts))


def _batch_of(examples, layout, pad_id, multiple=64):
    """One example per row, in rows as long as the longest, rounded up."""
    need = [int(a.max()) for a in _sizes(examples, layout)]
    readouts = round_up(need[1], multiple) if layout.readout == "tokens" else need[1]
    shape = Shape(len(examples), round_up(need[0], multiple), readouts, need[2])
    return build_batch([[e] for e in examples], shape, layout, pad_id)


def _visible(rows, b, t):
    """What token t of row b sees, in the order of positions: (position, token)."""
    seen = range(rows.attend_start[b, t], rows.attend_end[b, t])
    return sorted((int(rows.positions[b, s]), int(rows.tokens[b, s])) for s in seen)


def _readouts(batch, b):
    r = batch.readouts
    return [tuple(int(a[b, m]) for a in r[:3]) for m in np.flatnonzero(r.mask[b])]


def _check_row(batch, b, examples, layout):
    """Every readout of the row sees exactly the causal context of its token, in a sequence of its own."""
    slot = 0
    found = _readouts(batch, b)
    places = iter(found)
    for pair, example in enumerate(examples):
        for number, (completion, mask) in enumerate(zip(example.completions, example.masks, strict=True)):
            sequence = np.concatenate([example.prompt, completion]).tolist()
            p = len(example.prompt)
            wanted = [p + j for j in np.flatnonzero(mask)] if layout.readout == "tokens" else [len(sequence)]
            for place in wanted:
                source, target, of = next(places)
                assert of == slot
                assert target == (sequence[place] if layout.readout == "tokens" else 0)
                assert _visible(batch.rows, b, source) == list(enumerate(sequence[:place]))
                assert batch.rows.positions[b, source] == place - 1
            completions = batch.completions
            assert completions.mask[b, slot] and completions.pair[b, slot] == pair
            roles = (CHOSEN, REJECTED) if len(example.completions) == 2 else (SINGLE,)
            assert completions.role[b, slot] == roles[number]
            assert completions.weight[b, slot] == np.float32(example.weight)
            assert completions.score[b, slot] == np.float32(example.score)
            assert batch.record_ids[b, slot] == example.record
            slot += 1
    assert next(places, None) is None
    assert not batch.completions.mask[b, slot:].any() and (batch.record_ids[b, slot:] == -1).all()


def _check_padding(batch, b, used):
    rest = np.arange(used, batch.rows.tokens.shape[1])
    assert (batch.rows.attend_start[b, used:] == rest).all() and (batch.rows.attend_end[b, used:] == rest + 1).all()


LENGTHS = st.integers(1, 6)
LAYOUTS = [Layout("tokens"), Layout("tokens", False), Layout("last"), Layout("last", False)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(LENGTHS, LENGTHS, LENGTHS), max_size=3), min_size=1, max_size=3),
    slack=st.integers(0, 3),
)
def test_trap_packed_pairs_see_their_own_context_alone(layout, rows, slack):
    examples = [[_example(10 * b + i, *lengths) for i, lengths in enumerate(row)] for b, row in enumerate(rows)]
    need = [_sizes(row, layout) if row else None for row in examples]
    most = [max((int(n[k].sum()) for n in need if n), default=0) + slack for k in range(3)]
    batch = build_batch(examples, Shape(len(rows) + 1, *most), layout, pad_id=7)
    for b, row in enumerate(examples):
        _check_row(batch, b, row, layout)
        _check_padding(batch, b, int(need[b].tokens.sum()) if row else 0)
    _check_padding(batch, len(rows), 0)
    assert not batch.readouts.mask[-1].any()
    assert (batch.rows.attend_end > batch.rows.attend_start).all()  # no interval is ever empty
    assert (batch.rows.attend_start >= 0).all() and (batch.rows.attend_end <= batch.rows.tokens.shape[1]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5))
def test_packed_sequences_equal_unpacked_ones(lengths):
    layout = Layout("tokens")
    examples = [_example(i, *n) for i, n in enumerate(lengths)]
    alone = _batch_of(examples, layout, 0, multiple=1)
    need = _sizes(examples, layout)
    packed = build_batch([examples], Shape(1, *(int(a.sum()) for a in need)), layout, pad_id=0)
    _check_row(packed, 0, examples, layout)
    for b, example in enumerate(examples):
        _check_row(alone, b, [example], layout)
    seen = [
        [(_visible(batch.rows, b, s), t) for b in range(len(batch.rows.tokens)) for s, t, _ in _readouts(batch, b)]
        for batch in (alone, packed)
    ]
    assert seen[0] == seen[1]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, LENGTHS, LENGTHS)
def test_shared_prompt_equals_two_segments(prompt, chosen, rejected):
    example = _example(0, prompt, chosen, rejected)
    seen = []
    for shared in (True, False):
        layout = Layout("tokens", shared)
        batch = _batch_of([example], layout, 0, multiple=1)
        assert batch.rows.tokens.shape[1] == segment_tokens(prompt, (chosen, rejected), shared)
        seen.append([(_visible(batch.rows, 0, s), t, c) for s, t, c in _readouts(batch, 0)])
    assert seen[0] == seen[1]


def test_the_drawing_of_a_shared_pair():
    example = Example(
        0,
        np.array([5, 6]),
        (np.array([1, 2, 3]), np.array([8])),
        (np.ones(3, bool), np.ones(1, bool)),
        (True, True),
        1,
        0,
    )
    got = segment(example, Layout("tokens"))
    assert got.tokens.tolist() == [3, 2, 1, 5, 6, 8]
    assert got.positions.tolist() == [4, 3, 2, 0, 1, 2]
    assert got.attend_start.tolist() == [0, 1, 2, 3, 3, 3]
    assert got.attend_end.tolist() == [5, 5, 5, 4, 5, 6]
    assert got.source.tolist() == [4, 2, 1, 4]
    assert got.target.tolist() == [1, 2, 3, 8]
    assert got.completion.tolist() == [0, 0, 0, 1]


def test_trap_a_reward_is_read_at_the_stated_last_token_whatever_its_id():
    eos = 2  # which pads too
    completions = (np.array([9, eos, eos], np.int32), np.array([eos], np.int32))
    example = Example(
        0, np.array([1, eos], np.int32), completions, (np.ones(3, bool), np.ones(1, bool)), (True, True), 1.0, 0.0
    )
    for shared in (True, False):
        batch = _batch_of([example], Layout("last", shared), pad_id=eos)
        _check_row(batch, 0, [example], Layout("last", shared))
        assert batch.readouts.mask.sum() == 2


def test_trap_the_pad_id_decides_nothing():
    examples = [_example(0, 3, 4, 2), _example(1, 2, 1, 5)]
    for layout in LAYOUTS:
        batches = [_batch_of(examples, layout, pad_id) for pad_id in (0, 2, 49)]
        pads = [batch.rows.attend_end - batch.rows.attend_start == 1 for batch in batches]
        for batch in batches[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(batch.rows[1:], batches[0].rows[1:], strict=True))
            assert all(np.array_equal(a, b) for a, b in zip(batch.readouts, batches[0].readouts, strict=True))
            assert np.array_equal(batch.rows.tokens[~pads[0]], batches[0].rows.tokens[~pads[0]])


def test_all_masked_and_one_token():
    example = Example(0, np.array([1]), (np.array([2]),), (np.zeros(1, bool),), (False,), 1.0, 0.0)
    batch = _batch_of([example], Layout("tokens"), 0)
    assert batch.readouts.mask.shape == (1, 0) and batch.completions.mask.sum() == 1
    assert batch.rows.tokens.shape == (1, 64)


def test_trap_left_padded_prompts_keep_their_positions():
    examples = [Example(i, np.arange(1, n + 1), (), (), (), 1.0, 0.0) for i, n in enumerate((3, 1, 5))]
    batch = build_prompts(examples, Shape(4, 5, 0, 1), pad_id=9)
    for b, example in enumerate(examples):
        n = len(example.prompt)
        assert batch.rows.tokens[b].tolist() == [9] * (5 - n) + example.prompt.tolist()
        assert batch.rows.positions[b, 5 - n :].tolist() == list(range(n))
        for t in range(5 - n, 5):
            assert _visible(batch.rows, b, t) == list(enumerate(example.prompt[: t - 4 + n].tolist()))
    index = np.arange(5)
    assert (batch.rows.attend_start[3] == index).all() and (batch.rows.attend_end == index + 1).all()
    assert batch.completions.mask[:, 0].tolist() == [True, True, True, False]
    assert batch.readouts.mask.shape == (4, 0)


def test_a_row_that_does_not_fit_names_the_record():
    example = _example(17, 3, 4)
    for shape in (Shape(1, 6, 4, 1), Shape(1, 7, 0, 1), Shape(1, 7, 4, 0)):
        with pytest.raises(ValueError, match="record 17"):
            build_batch([[example]], shape, Layout("tokens"), 0)
    with pytest.raises(ValueError, match="record 17"):
        build_prompts([example], Shape(1, 2, 0, 1), 0)
