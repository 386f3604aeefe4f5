"""Completions as arrays, and prompts with their completions as rows of training."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, CausalByIndex, Readouts, Rows


class Rollout(NamedTuple):
    """Completions, one of each row.

    What is present is seen by attention and read by rewards; what is sampled is trained on.  They are the same but for
    tokens that the policy did not choose, such as what a tool answered.
    """

    tokens: Array  # int32 [B, R], 0 after the end
    present: Array  # bool [B, R], the completion's tokens, its stop token included: the first columns
    sampled: Array  # bool [B, R], those of them that the policy sampled itself
    logprobs: Array  # at least float32 [B, R], nats, at the sampling temperature, 0 where not sampled
    finished: Array  # bool [B], ended by a stop token


def completed_rows(rows: Rows, rollout: Rollout) -> tuple[Rows, Readouts]:
    """Prompts and their completions as rows of training: [pad .. prompt | completion .. pad].

    Args:
      rows: the prompts [B, P].
      rollout: their completions, R wide.

    Returns:
      Rows [B, P + R] of what is present, and readouts [B, R] of what is sampled: the completion's token m is predicted
      from row index P - 1 + m.
    """
    chex.assert_rank([rows.tokens, rollout.tokens], 2)
    batch, width = rows.tokens.shape
    length = rollout.tokens.shape[1]
    here = jnp.broadcast_to(width + jnp.arange(length, dtype=jnp.int32), (batch, length))
    position = rows.positions[:, -1:] + 1 + jnp.arange(length, dtype=jnp.int32)
    present, sampled = rollout.present, rollout.sampled
    completion = Rows(
        tokens=jnp.where(present, rollout.tokens, 0),
        positions=jnp.where(present, position, 0),
        attend_start=jnp.where(present, rows.attend_start[:, -1:], here),  # padding sees itself
        attend_end=here + 1,
        causal=CausalByIndex(),
    )
    rows = rows._replace(causal=CausalByIndex())
    whole = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), rows, completion)
    target = jnp.where(sampled, rollout.tokens, 0)
    readouts = Readouts(source=here - 1, target=target, completion=jnp.zeros_like(here), mask=sampled)
    return whole, readouts
