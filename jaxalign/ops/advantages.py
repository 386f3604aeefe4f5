"""Advantage estimators: from per-token rewards to advantages and, where there is a critic, returns.

All have one form, `estimator(rewards, mask, *, values=None, group=None, **options) -> (advantages, returns or None)`:
float [B, M] of every token, 0 where `mask` is False.  One with a critic reads `values` [B, M]; one without compares the
completions of a `group`, int32 [B], the number of the prompt that each answers.  `options` have the names of fields of
`config.algorithm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Array

# (rewards, mask, *, values, group, **options) -> (advantages, returns or None)
Estimator = Callable[..., tuple[Array, Array | None]]


def gae(
    rewards: Array,
    mask: Array,
    *,
    values: Array | None = None,
    group: Array | None = None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Array, Array]:
    """Generalised advantage estimation over the real tokens of each completion.

        delta_t = r_t + gamma V_{t'} - V_t            t' the next real token, V = 0 after the last one
        A_t     = delta_t + gamma lambda A_{t'}
        R_t     = A_t + V_t

    Source: Schulman et al. 2016 (arXiv:1506.02438), equations 11, 12 and 16.  The recursion starts at the last real
    token: rewards and values of padding are never read, whatever they hold (infinities and NaN included), and a
    place that is masked between real tokens is stepped over.

    Args:
      rewards: float [B, M], reward of each token.
      mask: bool [B, M], the real tokens.
      values: float [B, M], value of the state before each token; needed.
      group: not read.
      gamma: discount of a token, in [0, 1].
      gae_lambda: in [0, 1]; 0 trusts the values alone, 1 the rewards alone.

    Returns:
      (advantages, returns), each [B, M], at least float32, 0 where `mask` is False; no gradient flows through.

    >>> import numpy as np
    >>> one = np.ones((1, 3), np.float32)
    >>> a, r = gae(one, np.array([[True, True, False]]), values=0 * one, gamma=1.0, gae_lambda=1.0)
    >>> a.tolist(), r.tolist()
    ([[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]])
    """
    del group
    if values is None:
        raise ValueError("generalised advantage estimation without values: it needs a value model")
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])
    mask = jnp.asarray(mask)
    rewards, values = (jnp.where(mask, at_least_float32(jnp.asarray(x)), 0) for x in (rewards, values))
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    rewards, values = (jax.lax.stop_gradient(x.astype(dtype)) for x in (rewards, values))

    def back(carry, x):
        next_advantage, next_value = carry
        reward, value, real = x
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        carry = (jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value))
        return carry, jnp.where(real, advantage, 0)

    start = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(back, (start, start), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0)


ESTIMATORS: dict[str, Estimator] = {"gae": gae}


def estimator_options(estimator: Estimator) -> list[str]:
    """The names of an estimator's own options: what it takes by keyword, beside `values` and `group`.

    >>> estimator_options(gae)
    ['gamma', 'gae_lambda']
    """
    try:
        parameters = inspect.signature(estimator).parameters.values()
    except (TypeError, ValueError):  # a builtin does not tell
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("values", "group")]
