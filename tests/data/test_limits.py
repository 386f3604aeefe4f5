"""Limits on lengths."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.limits import Limits
from jaxalign.data.tokenize import Dropped, Example

BOS = 1


def _example(prompt, *completions, masks=None):
    completions = tuple(np.asarray(c, np.int32) for c in completions)
    masks = masks or tuple(np.ones(len(c), bool) for c in completions)
    return Example(0, np.asarray(prompt, np.int32), completions, masks, (True,) * len(completions), 1.0, 0.0)


def _cut(example, **limits):
    counts = Counter()
    limits = {
        "max_length": 100,
        "max_prompt_length": None,
        "max_completion_length": None,
        "truncation": "drop",
        "bos_id": BOS,
    } | limits
    return Limits(**limits).apply(example, counts), counts


LONG = _example([BOS, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33])


@pytest.mark.parametrize(
    "limits, reason, needs",
    [
        ({"max_prompt_length": 4}, "prompt longer than max_prompt_length", {"max_prompt_length": 5}),
        ({"max_completion_length": 3}, "completion longer than max_completion_length", {"max_completion_length": 4}),
        ({"max_length": 8}, "prompt and completion longer than max_length", {"max_length": 9}),
        (
            {"max_length": 4, "max_prompt_length": 3},
            "prompt longer than max_prompt_length",
            {"max_length": 9, "max_prompt_length": 5},
        ),
    ],
)
def test_drop_says_why_and_what_the_limit_would_have_to_be(limits, reason, needs):
    assert _cut(LONG, **limits) == (Dropped(0, reason, tuple(needs.items())), Counter())
    assert isinstance(_cut(LONG, **{**limits, **needs})[0], Example)


def test_what_fits_is_left_alone():
    for truncation in ("drop", "keep_start", "keep_end"):
        same, counts = _cut(LONG, max_length=9, max_prompt_length=5, max_completion_length=4, truncation=truncation)
        assert [a.tolist() for a in (same.prompt, *same.completions)] == [
            a.tolist() for a in (LONG.prompt, *LONG.completions)
        ]
        assert same.complete == (True, True) and not +counts


@pytest.mark.parametrize(
    "truncation, limits, prompt, completions, complete, cut",
    [
        ("keep_start", {"max_prompt_length": 3}, [BOS, 10, 11], [[20, 21, 22], [30, 31, 32, 33]], (True, True), (1, 0)),
        ("keep_end", {"max_prompt_length": 3}, [BOS, 12, 13], [[20, 21, 22], [30, 31, 32, 33]], (True, True), (1, 0)),
        (
            "keep_start",
            {"max_completion_length": 3},
            [BOS, 10, 11, 12, 13],
            [[20, 21, 22], [30, 31, 32]],
            (True, False),
            (0, 1),
        ),
        (
            "keep_end",
            {"max_completion_length": 3},
            [BOS, 10, 11, 12, 13],
            [[20, 21, 22], [30, 31, 32]],
            (True, False),
            (0, 1),
        ),
        ("keep_start", {"max_length": 7}, [BOS, 10, 11, 12, 13], [[20, 21], [30, 31]], (False, False), (0, 2)),
        ("keep_end", {"max_length": 7}, [BOS, 12, 13], [[20, 21, 22], [30, 31, 32, 33]], (True, True), (1, 0)),
        ("keep_end", {"max_length": 4}, [BOS, 13], [[20, 21], [30, 31]], (False, False), (1, 2)),
    ],
)
def test_trap_truncation_is_counted_and_keeps_what_it_says(truncation, limits, prompt, completions, complete, cut):
    got, counts = _cut(LONG, truncation=truncation, **limits)
    assert got.prompt.tolist() == prompt
    assert [c.tolist() for c in got.completions] == completions
    assert [m.tolist() for m in got.masks] == [[True] * len(c) for c in completions]
    assert got.complete == complete
    assert (counts["prompts truncated"], counts["completions truncated"]) == cut


def test_trap_what_truncation_empties_or_equals_is_dropped():
    long_prompt = _example(range(1, 9), [20], [30])
    assert _cut(long_prompt, max_length=5, truncation="keep_start")[0] == Dropped(
        0, "no room for a completion", (("max_length", 9),)
    )
    alike = _example([1], [20, 21, 22], [20, 21, 23])
    assert _cut(alike, max_completion_length=2, truncation="keep_end")[0] == Dropped(
        0, "chosen equals rejected after truncation", (("max_completion_length", 3),)
    )
    late = _example([1], [20, 21, 22], masks=(np.array([False, False, True]),))
    assert _cut(late, max_length=3, truncation="keep_start")[0] == Dropped(
        0, "no scored token left after truncation", (("max_length", 4),)
    )


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 12), max_size=2),
    st.integers(2, 14),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 8),
    st.sampled_from(["drop", "keep_start", "keep_end"]),
    st.booleans(),
)
def test_limits_hold(prompt, lengths, max_length, max_prompt, max_completion, truncation, bos):
    start = [BOS] if bos else [9]
    example = _example(
        start + list(range(10, 9 + prompt)), *(range(100 * i, 100 * i + n) for i, n in enumerate(lengths, 1))
    )
    got, _ = _cut(
        example,
        max_length=max_length,
        max_prompt_length=max_prompt,
        max_completion_length=max_completion,
        truncation=truncation,
    )
    if isinstance(got, Dropped):
        return
    assert 1 <= len(got.prompt) <= (max_prompt or max_length)
    for ours, whole, mask in zip(got.completions, example.completions, got.masks, strict=True):
        assert 1 <= len(ours) <= (max_completion or max_length)
        assert len(got.prompt) + len(ours) <= max_length
        assert ours.tolist() == whole[: len(ours)].tolist() and len(mask) == len(ours)
    for done, ours, whole in zip(got.complete, got.completions, example.completions, strict=True):
        assert done == (len(ours) == len(whole))
    kept = got.prompt.tolist()
    whole = example.prompt.tolist()
    if truncation == "keep_end":
        assert kept in (whole[len(whole) - len(kept) :], whole[:1] + whole[len(whole) - len(kept) + 1 :])
        assert not bos or len(kept) == 1 or kept[0] == BOS
    else:
        assert kept == whole[: len(kept)]
