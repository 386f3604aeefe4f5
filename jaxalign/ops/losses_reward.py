"""The loss of a reward model."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_sum
from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Terms


def reward_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    mask: jax.Array,
    *,
    margin: jax.Array | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> Terms:
    """Bradley-Terry: the log-likelihood of the stated preferences under P(chosen > rejected) = s(r_c - r_r - margin).

        loss = -(1 - eps) log s(d) - eps log s(-d) + center_coef (r_c + r_r)^2,   d = r_c - r_r - margin

    Sources: Ouyang et al. 2022 (arXiv 2203.02155) eq. 1; the margin, Touvron et al. 2023 (arXiv 2307.09288) eq. 2; the
    centring, Eisenstein et al. 2023 (arXiv 2312.09244).  As TRL 1.16's RewardTrainer, which has no label smoothing.

    Args:
      chosen: [N] scores of the chosen completions.
      rejected: [N] scores of the rejected ones.
      mask: [N] bool, or the weights of the pairs; 0 leaves a pair out.
      margin: [N] by how much the chosen should win, in units of score; None for 0.
      center_coef: pulls the mean score of a pair to 0: scores are fixed only up to a constant.
      label_smoothing: eps, the share of labels taken to be wrong, in [0, 0.5).

    Returns:
      Terms with loss [N]; metrics, means over the pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins`
      (without the stated margin), `rewards/accuracies` (chosen above rejected), `rewards/ties` (neither is above).

    >>> two, one = jnp.array([2.0]), jnp.array([1.0])
    >>> print(reward_loss(two, one, jnp.array([True])).loss)
    [0.3132617]
    """
    chex.assert_rank([chosen, rejected, mask], 1)
    chex.assert_equal_shape([chosen, rejected, mask])
    chosen, rejected = (jnp.where(mask != 0, at_least_float32(x), 0) for x in (chosen, rejected))
    logits = chosen - rejected
    if margin is not None:
        chex.assert_equal_shape([margin, mask])
        logits -= jnp.where(mask != 0, margin, 0).astype(logits.dtype)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)
    loss += center_coef * jnp.square(chosen + rejected)
    weights = mask.astype(chosen.dtype)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(chosen.dtype),
        "rewards/ties": (chosen == rejected).astype(chosen.dtype),
    }
    total = jnp.sum(weights)
    metrics = {name: (masked_sum(value, weights), total) for name, value in values.items()}
    return Terms(jnp.where(mask != 0, loss, 0), weights, metrics)
