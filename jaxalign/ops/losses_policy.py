"""The clipped policy and value losses of PPO, per token."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Array, Terms


def policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    ref_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float,
    entropy: Array | None = None,
    entropy_coef: float = 0.0,
) -> Terms:
    """The clipped surrogate of PPO for each token, with an entropy bonus.

        rho_t = exp(log pi(x_t) - log pi_old(x_t))
        L_t   = max(-A_t rho_t, -A_t clip(rho_t, 1 - c, 1 + c)) - entropy_coef * H_t

    Source: Schulman et al. 2017 (arXiv:1707.06347), equations 7 and 9, with the sign of a loss.  Averaged over the
    real tokens of the whole batch, as in TRL and the original.  H_t is the entropy of the whole distribution at
    token t and at the sampling temperature.

    Metrics, all over real tokens: `policy/approxkl` = mean((log rho)^2) / 2, an estimate of KL(old || new) that is
    never negative (k2); `policy/clipfrac`, share of tokens whose clipped term is the greater; `policy/entropy`;
    `policy/ref_kl` = mean of k3 against the reference; `val/ratio`, mean of rho (TRL's name).

    Args:
      logprobs: float [N, R], nats, under the policy being trained.
      old_logprobs: float [N, R], under the policy that sampled, by the same forward, at the same temperature.
      ref_logprobs: float [N, R], under the reference (for the metric; PPO's KL is in the reward).
      advantages: float [N, R].
      mask: bool [N, R], the real tokens.
      clip_range: c.
      entropy: float [N, R], nats; None where no entropy is at hand.
      entropy_coef: weight of the bonus.

    Returns:
      Terms of shape [N, R].

    Raises:
      ValueError: an entropy coefficient without entropies.

    >>> import numpy as np
    >>> x = np.zeros((1, 1), np.float32)
    >>> old = np.log(np.float32([[0.5]]))
    >>> float(policy_loss(x, old, x, x + 1, x == 0, clip_range=0.2).loss[0, 0])  # rho = 2, clipped to 1.2
    -1.2000000476837158
    """
    chex.assert_rank([logprobs, old_logprobs, ref_logprobs, advantages, mask], 2)
    chex.assert_equal_shape([logprobs, old_logprobs, ref_logprobs, advantages, mask])
    chex.assert_type([logprobs, old_logprobs, ref_logprobs, advantages, mask], [float] * 4 + [bool])
    if entropy is None and entropy_coef:
        raise ValueError("entropy_coef without entropies")
    mask = jnp.asarray(mask)
    logprobs, old_logprobs, ref_logprobs, advantages = (
        jnp.where(mask, at_least_float32(jnp.asarray(x)), 0) for x in (logprobs, old_logprobs, ref_logprobs, advantages)
    )
    old_logprobs, ref_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, ref_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    loss = jnp.maximum(plain, clipped)
    weight = mask.astype(loss.dtype)
    difference = jax.lax.stop_gradient(logprobs) - ref_logprobs
    metrics = {
        "policy/approxkl": log_ratio**2 / 2,
        "policy/clipfrac": (clipped > plain).astype(loss.dtype),
        "policy/ref_kl": jnp.expm1(-difference) + difference,
        "val/ratio": ratio,
    }
    if entropy is not None:
        chex.assert_equal_shape([entropy, mask])
        entropy = jnp.where(mask, at_least_float32(jnp.asarray(entropy)), 0)
        metrics["policy/entropy"] = entropy
        loss = loss - entropy_coef * entropy
    return Terms(jnp.where(mask, loss, 0), weight, _over_tokens(metrics, weight))


def value_loss(values: Array, old_values: Array, returns: Array, mask: Array, *, clip_range: float) -> Terms:
    """The clipped value loss of PPO for each token.

        clipped_t = V_old,t + clip(V_t - V_old,t, -c, c)
        L_t       = 0.5 * max((V_t - R_t)^2, (clipped_t - R_t)^2)

    Source: openai/baselines ppo2 `model.py` and TRL 1.12 `ppo_trainer.py`, both with the factor 0.5; the coefficient
    `vf_coef` is on top of it.  (Schulman et al. 2017, equation 9, has neither factor nor clip.)

    Metrics over real tokens: `val/clipfrac`, share of tokens whose clipped term is the greater; `val/error`, mean of
    (V - R)^2; `val/mean`, mean of V.

    Args:
      values: float [N, R], of the value model being trained.
      old_values: float [N, R], when the experience was collected.
      returns: float [N, R].
      mask: bool [N, R], the real tokens.
      clip_range: c, in units of value.

    Returns:
      Terms of shape [N, R].

    >>> import numpy as np
    >>> one = np.ones((1, 1), np.float32)
    >>> float(value_loss(one, 0 * one, one, one > 0, clip_range=0.2).loss[0, 0])  # max(0, (0.2 - 1)^2) / 2
    0.320000022649765
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type([values, old_values, returns, mask], [float] * 3 + [bool])
    mask = jnp.asarray(mask)
    values, old_values, returns = (
        jnp.where(mask, at_least_float32(jnp.asarray(x)), 0) for x in (values, old_values, returns)
    )
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    plain = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    loss = 0.5 * jnp.maximum(plain, clipped)
    weight = mask.astype(loss.dtype)
    metrics = {
        "val/clipfrac": (clipped > plain).astype(loss.dtype),
        "val/error": plain,
        "val/mean": values,
    }
    return Terms(jnp.where(mask, loss, 0), weight, _over_tokens(metrics, weight))


def _over_tokens(metrics: dict[str, Array], weight: Array) -> dict[str, tuple[Array, Array]]:
    """(sum, weight) of each statistic over real tokens; statistics carry no gradient."""
    return {name: (jnp.sum(jax.lax.stop_gradient(x) * weight), jnp.sum(weight)) for name, x in metrics.items()}
