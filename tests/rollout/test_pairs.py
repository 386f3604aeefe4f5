"""Two completions of a prompt in one row: the data layer's layout, made on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.promises import check_layout
from jaxalign.data.rows import Layout, segment
from jaxalign.data.tokenize import Example
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.pairs import last_columns, paired_rows
from jaxalign.rollout.slots import repeat_rows
from tests.train.ppo_world import prompt_batch

PROMPTS = [[1, 7, 9], [1, 8, 2, 3, 4, 6], [9]]
SAID = [[4, 5, 6, 3], [7, 3], [8], [2, 4, 6, 8], [11, 12, 3], [3]]  # two of each prompt
LENGTH = 4


def paired(width=6):
    """The layout of the six, and of a prompt that is not there."""
    batch = repeat_rows(prompt_batch(PROMPTS, width, rows=4, pad=5), 2)
    mask = np.array([[k < len(s) for k in range(LENGTH)] for s in [*SAID, [], []]])
    tokens = np.array([s + [0] * (LENGTH - len(s)) for s in [*SAID, [], []]], np.int32)
    rollout = Rollout(jnp.asarray(tokens), *[jnp.asarray(mask)] * 2, jnp.zeros(mask.shape), jnp.zeros(8, bool))
    rows, readouts = jax.device_get(jax.jit(paired_rows)(batch.rows, rollout))
    return batch.rows, rollout, rows, readouts


def test_rows_are_those_of_the_data_layer():
    for width in (6, 9):
        _, _, rows, readouts = paired(width)
        assert rows.tokens.shape == (4, width + 2 * LENGTH) and readouts.source.shape == (4, 2 * LENGTH)
        index = np.arange(width + 2 * LENGTH)
        for n, prompt in enumerate(PROMPTS):
            said = SAID[2 * n : 2 * n + 2]
            whole = tuple(np.ones(len(x), bool) for x in said)
            example = Example(n, np.array(prompt), tuple(map(np.array, said)), whole, (True, True), 1.0, 0.0)
            wanted = segment(example, Layout("tokens"))
            first = width + LENGTH - len(prompt) - len(said[0])
            here = slice(first, first + len(wanted.tokens))
            np.testing.assert_array_equal(rows.tokens[n, here], wanted.tokens)
            np.testing.assert_array_equal(rows.positions[n, here], wanted.positions)
            np.testing.assert_array_equal(rows.attend_start[n, here], wanted.attend_start + first)
            np.testing.assert_array_equal(rows.attend_end[n, here], wanted.attend_end + first)
            mask = readouts.mask[n]
            np.testing.assert_array_equal(readouts.source[n][mask], wanted.source + first)
            np.testing.assert_array_equal(readouts.target[n][mask], wanted.target)
            np.testing.assert_array_equal(readouts.completion[n][mask], wanted.completion)
            outside = np.ones(len(index), bool)
            outside[here] = False
            np.testing.assert_array_equal(rows.attend_start[n][outside], index[outside])  # padding sees itself
            np.testing.assert_array_equal(rows.attend_end[n][outside], index[outside] + 1)


def test_nothing_is_read_of_a_prompt_that_is_not_there():
    _, _, rows, readouts = paired()
    assert not readouts.mask[3].any()
    check_layout(rows)
    assert (rows.attend_start < rows.attend_end).all() and (rows.attend_start[3] <= np.arange(14)).all()


def test_last_columns_hold_the_last_tokens():
    given, rollout, rows, _ = paired()
    last = last_columns(given, rollout.present, 2)
    found = np.take_along_axis(rows.tokens, np.asarray(last), axis=1)
    assert found[:3].reshape(-1).tolist() == [s[-1] for s in SAID]
    alone = last_columns(given, rollout.present, 1)[:6, 0]
    assert alone.tolist() == [6 + len(s) - 1 for s in SAID]
