"""Two completions of a prompt in one row, which share it: `reversed(first) + prompt + second`.

The layout of `jaxalign.data.rows`, made on the devices from left-padded prompts [P] and completions of width R:

    column     b ... b+R-1        |  b+R ... R+P-1  |  R+P ... 2R+P-1        b: the prompt's padding
    token      first, R-1 .. 0    |  prompt         |  second, 0 .. R-1
    sees       itself up to the   |  prompt's start |  prompt's start
               prompt's end       |  up to itself   |  up to itself

Where a completion has ended, its columns are padding.  A prompt is computed once for two completions, and a row takes
P + 2R tokens in place of 2(P + R).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.rollout.completed import Rollout
from jaxalign.types import Array, CausalByPosition, Readouts, Rows


def completions_per_row(num_samples: int) -> int:
    """How many completions share a row: two for an even number of samples, else one.

    Args:
      num_samples: completions of each prompt.

    >>> [completions_per_row(n) for n in (1, 2, 3, 4)]
    [1, 2, 1, 2]
    """
    return 1 if num_samples % 2 else 2


def paired_rows(rows: Rows, rollout: Rollout) -> tuple[Rows, Readouts]:
    """Completions, two by two, as rows of training.

    Args:
      rows: the prompt of each completion, [2N, P], left-padded; completions 2n and 2n + 1 have the same.
      rollout: the completions, R wide.

    Returns:
      Rows [N, P + 2R] of what is present, and readouts [N, 2R] of what is sampled: those of the first completion, then
      those of the second, each in the order of its tokens.
    """
    chex.assert_rank([rows.tokens, rollout.tokens], 2)
    prompt = jax.tree.map(lambda x: x.reshape(-1, 2, x.shape[1])[:, 0], rows)
    count, width = prompt.tokens.shape
    length = rollout.tokens.shape[1]
    tokens, present = (x.reshape(count, 2, length) for x in (rollout.tokens, rollout.present))
    begin, middle = length + prompt.attend_start[:, -1:], length + width  # columns of the prompt
    said = prompt.positions[:, -1:] + 1  # the position of a completion's first token

    column = jnp.broadcast_to(jnp.arange(middle + length, dtype=jnp.int32), (count, middle + length))
    back, on, within = begin - 1 - column, column - middle, column - length  # number of the token, in each part
    first, second = _taken(present[:, 0], back), _taken(present[:, 1], on)
    asked = (column >= begin) & (column < middle)

    def choose(of_first, of_second, of_prompt, other):
        return jnp.where(first, of_first, jnp.where(second, of_second, jnp.where(asked, of_prompt, other)))

    whole = Rows(
        tokens=choose(
            _taken(tokens[:, 0], back), _taken(tokens[:, 1], on), _taken(prompt.tokens, within), jnp.int32(0)
        ),
        positions=choose(said + back, said + on, _taken(prompt.positions, within), jnp.int32(0)),
        attend_start=choose(column, begin, begin, column),  # padding sees itself
        attend_end=choose(middle, column + 1, column + 1, column + 1),
        causal=CausalByPosition(),
    )
    place = jnp.arange(length, dtype=jnp.int32)
    sources = [jnp.where(place == 0, middle - 1, begin - place), jnp.broadcast_to(middle - 1 + place, (count, length))]
    mask = rollout.sampled.reshape(count, 2 * length)
    readouts = Readouts(
        source=jnp.concatenate(sources, axis=1),
        target=jnp.where(mask, tokens.reshape(count, 2 * length), 0),
        completion=jnp.broadcast_to(jnp.repeat(jnp.arange(2, dtype=jnp.int32), length), mask.shape),
        mask=mask,
    )
    return whole, readouts


def last_columns(rows: Rows, present: Array, together: int) -> Array:
    """Where the last token of each completion stands, in rows of training.

    Args:
      rows: the prompt of each completion, [B, P].
      present: bool [B, R], the completions' tokens.
      together: completions of a row, as `completions_per_row`.

    Returns:
      int32 [B / together, together].
    """
    width, length = rows.tokens.shape[1], present.shape[1]
    count = jnp.sum(present, axis=1, dtype=jnp.int32)
    if together == 1:
        return (width - 1 + count)[:, None]
    backwards = length + rows.attend_start[:, -1] - count
    return jnp.stack([backwards[::2], (length + width - 1 + count)[1::2]], axis=1)


def _taken(x: Array, index: Array) -> Array:
    """x at the indices of each row; 0 where there is no such index."""
    inside = (index >= 0) & (index < x.shape[1])
    return jnp.where(inside, jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1), jnp.zeros((), x.dtype))
