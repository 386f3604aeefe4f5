"""The KL divergence to the reference: estimators on sampled tokens, the reward they make, the coefficient."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Array

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str) -> Array:
    """Estimates KL(policy || reference) of each token from the one token that the policy sampled.

    With `d = log policy(x) - log reference(x)`, x drawn from the policy:

        k1 = d                      unbiased; negative wherever the reference likes the token better, so that a
                                    batch's mean may be negative: that is noise, not an error
        k2 = d^2 / 2                biased (to second order equal to the KL), never negative, low variance
        k3 = exp(-d) - 1 + d        unbiased, never negative, low variance; explodes where the policy has given
                                    up a token that the reference likes

    The sign is policy minus reference in all three: a policy that drifts away has a positive KL, and the reward
    subtracts it.  Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html,
    whose ratio r = reference / policy is exp(-d).

    Args:
      logprobs: float, any shape, nats, log-probs of the sampled tokens under the policy that sampled them.
      ref_logprobs: same shape, under the reference, at the same temperature.
      estimator: "k1", "k2" or "k3".

    Returns:
      The estimates in nats, same shape, at least float32.

    Raises:
      ValueError: for another name.

    >>> import numpy as np
    >>> a, b = np.log(np.float32([0.5])), np.log(np.float32([0.25]))
    >>> [round(float(kl_estimate(a, b, name)[0]), 4) for name in ESTIMATORS]
    [0.6931, 0.2402, 0.1931]
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    chex.assert_type([logprobs, ref_logprobs], float)
    difference = at_least_float32(jnp.asarray(logprobs)) - at_least_float32(jnp.asarray(ref_logprobs))
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"KL estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")


def token_rewards(scores: Array, kl: Array, mask: Array, kl_coef: Array | float) -> Array:
    """Rewards of each token: the KL at every token, the completion's score at its last real token.

        r_t = -kl_coef * kl_t + [t is the last real token] * score

    Source: Ziegler et al. 2019 (arXiv:1909.08593), equation 2, per token as in Stiennon et al. 2020.  (TRL adds the
    score one place after the last real token; the return of every real token is the same for gamma = lambda = 1.)

    Args:
      scores: float [B], the reward of each whole completion.
      kl: float [B, M], nats, one estimate per token.
      mask: bool [B, M], the completion's real tokens.
      kl_coef: float or scalar array.

    Returns:
      float [B, M]; 0 where `mask` is False, and all 0 for a completion without real tokens.

    >>> import numpy as np
    >>> token_rewards(np.float32([1.0]), np.float32([[0.5, 0.5, 9.0]]), np.array([[True, True, False]]), 0.1).tolist()
    [[-0.05000000074505806, 0.949999988079071, 0.0]]
    """
    chex.assert_rank([scores, kl, mask], [1, 2, 2])
    chex.assert_equal_shape([kl, mask])
    chex.assert_type([scores, kl, mask], [float, float, bool])
    mask = jnp.asarray(mask)
    rewards = jnp.where(mask, -kl_coef * at_least_float32(jnp.asarray(kl)), 0)
    return rewards + jnp.where(last_real(mask), at_least_float32(jnp.asarray(scores))[:, None], 0)


def last_real(mask: Array) -> Array:
    """Marks the last True place of each row.

    Args:
      mask: bool [B, M].

    Returns:
      bool [B, M] with one True per row, none for a row without any.

    >>> import numpy as np
    >>> last_real(np.array([[True, True, False], [False, False, False]])).tolist()
    [[False, True, False], [False, False, False]]
    """
    chex.assert_rank(mask, 2)
    mask = jnp.asarray(mask)
    later = jnp.flip(jnp.cumsum(jnp.flip(mask, 1), axis=1), 1)  # real places from here on
    return mask & (later == 1)


def adapt_kl_coef(kl_coef: Array, observed: Array, num_completions: Array, *, target: float, horizon: float) -> Array:
    """Moves the KL coefficient towards a target divergence, in proportion to the error.

        error = clip(observed / target - 1, -0.2, 0.2)
        kl_coef <- kl_coef * (1 + error * num_completions / horizon)

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, with K_beta = num_completions / horizon as in its code
    (openai/lm-human-preferences, `AdaptiveKLController`).

    Args:
      kl_coef: scalar, the coefficient of the iteration observed.
      observed: scalar, nats a completion, mean over the iteration's completions.
      num_completions: scalar, how many they were.
      target: nats a completion.
      horizon: completions over which the coefficient moves by a factor of about e^0.2 at most.

    Returns:
      The coefficient of the next iteration, same dtype.

    >>> import numpy as np
    >>> float(adapt_kl_coef(np.float32(0.1), np.float32(60.0), 1000, target=6.0, horizon=10_000))
    0.10199999809265137
    """
    chex.assert_rank([kl_coef, observed], 0)
    error = jnp.clip(observed / target - 1, -0.2, 0.2)
    return (kl_coef * (1 + error * num_completions / horizon)).astype(jnp.asarray(kl_coef).dtype)
