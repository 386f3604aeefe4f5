"""Log-ratios of pairs, policy minus reference: what losses on pairs are made of, and what is logged of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_sum
from jaxalign.ops.precision import at_least_float32
from jaxalign.types import Terms

Pair = Mapping[str, jax.Array]  # {"chosen": [N], "rejected": [N]}


class LogRatios(NamedTuple):
    """Of pairs [N], zeros where a pair is masked."""

    chosen: jax.Array  # a: policy minus reference, summed over the completion, in nats
    rejected: jax.Array  # b
    policy: Pair  # the policy's log-probs
    weights: jax.Array  # of the pairs, in the values' dtype


def log_ratios(policy: Pair, ref: Pair, mask: jax.Array) -> LogRatios:
    """The log-ratios of pairs in at least float32; no gradient reaches the reference.

    Args:
      policy: {"chosen", "rejected"} [N], log-probs of the completions summed over their tokens, in nats.
      ref: the same under the reference.
      mask: [N] bool, or the weights of the pairs; 0 leaves a pair out, whatever its values.
    """
    arrays = [policy["chosen"], policy["rejected"], ref["chosen"], ref["rejected"], mask]
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    here = {k: jnp.where(mask != 0, at_least_float32(policy[k]), 0) for k in ("chosen", "rejected")}
    there = {k: jnp.where(mask != 0, jax.lax.stop_gradient(at_least_float32(ref[k])), 0) for k in here}
    chosen, rejected = here["chosen"] - there["chosen"], here["rejected"] - there["rejected"]
    return LogRatios(chosen, rejected, here, mask.astype(chosen.dtype))


def by_token(ratios: LogRatios, lengths: Pair) -> tuple[jax.Array, jax.Array]:
    """Log-ratios of both sides, each divided by its completion's scored tokens."""
    return ratios.chosen / jnp.maximum(lengths["chosen"], 1), ratios.rejected / jnp.maximum(lengths["rejected"], 1)


def pair_terms(loss: jax.Array, ratios: LogRatios, beta: float) -> Terms:
    """A loss on pairs with its weights, and what is logged of every such loss, means over the pairs.

    `rewards/{chosen,rejected}` the implicit rewards beta a and beta b, `rewards/margins` their difference,
    `rewards/accuracies` the share of pairs with a positive margin, `rewards/ties` the share with none (all
    before the first update, where policy and reference are one), `logps/{chosen,rejected}` the policy's log-probs
    (nats a completion), `dpo/gradient_weight` beta s(-beta D): how hard DPO's gradient pulls at a pair (arXiv
    2305.18290, section 4); near beta where the policy ranks a pair wrongly, near 0 where it is sure and right.

    Args:
      loss: [N].
      ratios: of the pairs.
      beta: of the rewards.
    """
    chosen, rejected, policy, weights = ratios
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
    metrics = {name: (masked_sum(value, weights), total) for name, value in values.items()}
    return Terms(jnp.where(weights != 0, loss, 0), weights, metrics)
