"""Losses on preference pairs that need no reference model: SimPO, ORPO, and the chosen completion's own log-prob.

They have the arguments of `losses_preference.sigmoid_loss`, and never look at `ref`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.ops.log_ratios import LogRatios, Pair, by_token, log_ratios, pair_terms
from jaxalign.types import Terms


def simpo_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, simpo_gamma: float = 0.5
) -> Terms:
    """SimPO: log-probs averaged over a completion's tokens as rewards, which are to differ by a margin.

        loss = -log s(beta log pi(chosen) / len_chosen - beta log pi(rejected) / len_rejected - gamma)

    Source: Meng et al. 2024 (arXiv 2405.14734) eq. 6, with beta 2 to 10 and gamma 0.3 to 1.6.

    Args:
      policy, mask: as `losses_preference.sigmoid_loss`.
      ref: not used.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      beta: in tokens / nat.
      simpo_gamma: the margin, in units of the reward.

    Returns:
      Terms with loss [N]; rewards among the metrics are these averages times beta.

    >>> one, same = {"chosen": jnp.ones(1), "rejected": jnp.ones(1)}, {"chosen": -jnp.ones(1), "rejected": -jnp.ones(1)}
    >>> print(simpo_loss(same, one, one, jnp.array([True]), beta=2.0).loss.round(4))
    [0.9741]
    """
    ratios = _by_token(policy, lengths, mask)
    margin = beta * (ratios.chosen - ratios.rejected)
    return pair_terms(-jax.nn.log_sigmoid(margin - simpo_gamma), ratios, beta)


def orpo_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """ORPO's odds ratio: the chosen completion's odds over the rejected one's; beside `sft`, with weight 1, it is ORPO.

        p = exp(log pi / len);  odds = p / (1 - p);  loss = -beta log s(log odds(chosen) - log odds(rejected))

    Source: Hong et al. 2024 (arXiv 2403.07691) eq. 7, with beta their lambda, 0.1.  A probability of 1 has infinite
    odds: averages above -1e-6 nats count as that.

    Args:
      policy, mask: as `losses_preference.sigmoid_loss`.
      ref: not used.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      beta: weight of the odds ratio beside the log-probs of `sft`.

    Returns:
      Terms with loss [N]; rewards among the metrics are log-probs per token times beta.

    >>> one, same = {"chosen": jnp.ones(1), "rejected": jnp.ones(1)}, {"chosen": -jnp.ones(1), "rejected": -jnp.ones(1)}
    >>> print(orpo_loss(same, one, one, jnp.array([True]), beta=0.1).loss.round(4))
    [0.0693]
    """
    ratios = _by_token(policy, lengths, mask)
    log_odds = _log_odds(ratios.chosen) - _log_odds(ratios.rejected)
    return pair_terms(-beta * jax.nn.log_sigmoid(log_odds), ratios, beta)


def chosen_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float) -> Terms:
    """The language model's loss on chosen completions, a mean over their tokens: what SFT on them minimises.

        loss = -log pi(chosen) / len_chosen, weighted by len_chosen

    Beside a loss on pairs it keeps the chosen completions likely: DPO + NLL (Pang et al. 2024, arXiv 2404.19733), CPO
    (Xu et al. 2024, arXiv 2401.08417), ORPO.

    Args:
      policy, mask: as `losses_preference.sigmoid_loss`.
      ref: not used.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      beta: of the rewards among the metrics alone.

    Returns:
      Terms with loss [N] in nats a token, and weights times tokens.
    """
    ratios = log_ratios(policy, jax.tree.map(jnp.zeros_like, dict(policy)), mask)
    terms = pair_terms(-by_token(ratios, lengths)[0], ratios, beta)
    return terms._replace(weight=terms.weight * lengths["chosen"])


def _by_token(policy: Pair, lengths: Pair, mask: jax.Array) -> LogRatios:
    """Log-probs of both sides, each divided by its completion's scored tokens."""
    ratios = log_ratios(policy, jax.tree.map(jnp.zeros_like, dict(policy)), mask)
    chosen, rejected = by_token(ratios, lengths)
    return ratios._replace(chosen=chosen, rejected=rejected)


def _log_odds(logprob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p, exact at both ends: log(1 - exp(x)) by Mächler's two forms."""
    x = jnp.where(logprob < -1e-6, logprob, -1e-6)
    near = x > -0.6931472
    small, large = jnp.where(near, x, -0.5), jnp.where(near, -1.0, x)  # neither form sees what the other is for
    return x - jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
