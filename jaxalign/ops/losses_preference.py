"""Losses on preference pairs given sequence log-probs of the policy and of a reference.

Notation: a = chosen log-ratio (policy minus reference, summed over the completion), b = rejected log-ratio,
D = a - b, s = logistic function.  `beta a` is the implicit reward of the chosen completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_sum
from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Terms

Pair = Mapping[str, jax.Array]  # {"chosen": [N], "rejected": [N]}
PreferenceLoss = Callable[..., Terms]  # (policy, ref, lengths, mask, *, beta, **options)


def sigmoid_loss(
    policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> Terms:
    """DPO, with the labels flipped at a stated rate where `label_smoothing` is not 0 (cDPO).

        loss = -(1 - eps) log s(beta D) - eps log s(-beta D)

    Sources: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; Mitchell 2023, "A note on DPO with noisy preferences",
    eq. 3.  TRL 1.16 ignores label smoothing here.

    Args:
      policy: {"chosen", "rejected"} [N], log-probs of the completions summed over their tokens, in nats.
      ref: the same under the reference; a constant, no gradient reaches it.
      lengths: {"chosen", "rejected"} [N], scored tokens; not used by this loss.
      mask: [N] bool, or the weights of the pairs; 0 leaves a pair out.
      beta: strength of the tie to the reference, per nat; positive.
      label_smoothing: eps, the share of labels taken to be wrong, in [0, 0.5).

    Returns:
      Terms with loss [N]; metrics as `_metrics` says.

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(sigmoid_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [0.6931472]
    """
    del lengths
    chosen, rejected, policy, mask = _log_ratios(policy, ref, mask)
    logits = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)
    return Terms(jnp.where(mask != 0, loss, 0), mask, _metrics(policy, chosen, rejected, mask, beta))


def ipo_loss(policy: Pair, ref: Pair, lengths: Pair, mask: jax.Array, *, beta: float, average: bool = True) -> Terms:
    """IPO: the log-ratio gap is pulled to 1 / (2 beta) and no further.

        average:  loss = (a / len_chosen - b / len_rejected - 1 / (2 beta))^2
        sum:      loss = (a - b - 1 / (2 beta))^2

    Source: Azar et al. 2023 (arXiv 2310.12036) eq. 17, with beta their tau.  The paper writes sums over sequences, as
    OpenRLHF computes; TRL 1.16 averages over tokens and reports that the authors confirmed that form.

    Args:
      policy, ref, mask: as `sigmoid_loss`.
      lengths: {"chosen", "rejected"} [N], scored tokens of each completion.
      beta: in units of 1 / nat, or tokens / nat where averaged.
      average: per token (TRL's form) or summed (the paper's).

    Returns:
      Terms with loss [N]; metrics as `_metrics` says (rewards are of sums in both forms).

    >>> zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    >>> print(ipo_loss(zero, zero, zero, jnp.array([True]), beta=0.1).loss)
    [25.]
    """
    chosen, rejected, policy, mask = _log_ratios(policy, ref, mask)
    gap = chosen - rejected
    if average:
        gap = chosen / jnp.maximum(lengths["chosen"], 1) - rejected / jnp.maximum(lengths["rejected"], 1)
    loss = jnp.square(gap - 1 / (2 * beta))
    return Terms(jnp.where(mask != 0, loss, 0), mask, _metrics(policy, chosen, rejected, mask, beta))


# Every loss on pairs, by the name that `algorithm.loss` gives it.
PREFERENCE_LOSSES: Mapping[str, PreferenceLoss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
}


def _log_ratios(policy: Pair, ref: Pair, mask: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], Any]:
    """Chosen and rejected log-ratios, the policy's log-probs, the weights; masked pairs become zeros beforehand."""
    arrays = [policy["chosen"], policy["rejected"], ref["chosen"], ref["rejected"], mask]
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    here = {k: jnp.where(mask != 0, at_least_float32(policy[k]), 0) for k in ("chosen", "rejected")}
    there = {k: jnp.where(mask != 0, jax.lax.stop_gradient(at_least_float32(ref[k])), 0) for k in here}
    chosen, rejected = here["chosen"] - there["chosen"], here["rejected"] - there["rejected"]
    return chosen, rejected, here, mask.astype(chosen.dtype)


def _metrics(policy, chosen, rejected, weights, beta) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What is logged of every preference loss, means over the pairs.

    `rewards/{chosen,rejected}` the implicit rewards beta a and beta b, `rewards/margins` their difference,
    `rewards/accuracies` the share of pairs with a positive margin, `rewards/ties` the share with none (all
    before the first update, where policy and reference are one), `logps/{chosen,rejected}` the policy's log-probs
    (nats a completion), `dpo/gradient_weight` beta s(-beta D): how hard DPO's gradient pulls at a pair (arXiv
    2305.18290, section 4); near beta where the policy ranks a pair wrongly, near 0 where it is sure and right.
    """
    margins = beta * (chosen - rejected)
    values = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).astype(margins.dtype),
        "rewards/ties": (margins == 0).astype(margins.dtype),
        "logps/chosen": policy["chosen"],
        "logps/rejected": policy["rejected"],
        "dpo/gradient_weight": beta * jax.nn.sigmoid(-margins),
    }
    total = jnp.sum(weights)
    return {name: (masked_sum(value, weights), total) for name, value in values.items()}
