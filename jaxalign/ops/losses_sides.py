"""Losses on preference pairs that hold each completion against the reference, and not only one against the other.

DPO's loss sees the difference alone, and may lower both completions' log-probs as long as the rejected one falls
faster.  Notation and arguments are those of `losses_preference.sigmoid_loss`; `lengths` is not used by any.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.ops.log_ratios import Pair, log_ratios, pair_terms
from jaxalign.types import Terms


def nca_pair_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """NCA: the chosen completion's implicit reward is a logit of its own, which cannot go on falling.

        loss = -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2

    Source: Chen et al. 2024 (arXiv 2402.05369), for two completions with hard labels.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(nca_pair_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [1.3862944]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return pair_terms(-jax.nn.log_sigmoid(chosen) - noise / 2, ratios, beta)


def sppo_hard_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """SPPO with hard labels: the chosen log-ratio is pulled to 1 / (2 beta), the rejected one to its negative.

        loss = (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2

    Source: Wu et al. 2024 (arXiv 2405.00675) eq. 4.7, with their eta = 1 / beta and probabilities 1 and 0.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(sppo_hard_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [50.]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    aim = 1 / (2 * beta)
    return pair_terms(jnp.square(ratios.chosen - aim) + jnp.square(ratios.rejected + aim), ratios, beta)


def apo_zero_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """APO-zero: the chosen completion up and the rejected one down, for answers better than the model's own.

        loss = 1 - s(beta a) + s(beta b)

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 7.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(apo_zero_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [1.]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    loss = jax.nn.sigmoid(-beta * ratios.chosen) + jax.nn.sigmoid(beta * ratios.rejected)
    return pair_terms(loss, ratios, beta)


def apo_down_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """APO-down: both completions down, the rejected one further, for answers worse than the model's own.

        loss = s(beta a) + 1 - s(beta D)

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266) eq. 8.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(apo_down_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [1.]
    """
    del lengths
    ratios = log_ratios(policy, ref, mask)
    logits = beta * (ratios.chosen - ratios.rejected)
    return pair_terms(jax.nn.sigmoid(beta * ratios.chosen) + jax.nn.sigmoid(-logits), ratios, beta)
