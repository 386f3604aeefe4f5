"""The policy-gradient step of PPO: a clipped policy loss and a clipped value loss on collected experience."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.logits import Head
from jaxalign.ops.losses_policy import policy_loss, value_loss
from jaxalign.ops.readout import read_with_aux, scalar_readout, token_logprobs
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.sft import readout_weights
from jaxalign.types import Params, PolicyBatch, Terms


def policy_objective(
    apply: Callable[..., Any],
    head: Callable[[Params], jax.Array | Head],
    value_apply: Callable[..., Any],
    value_kernel: Callable[[Params], jax.Array],
    *,
    temperature: float,
    clip_range: float,
    value_clip_range: float,
    vf_coef: float,
    entropy_coef: float,
) -> Objective:
    """PPO's two losses, means over the real completion tokens of the whole batch.

        policy: mean_t [max(-A rho, -A clip(rho))] - entropy_coef * mean_t H_t
        value:  vf_coef * mean_t [max((V - R)^2, (V_clipped - R)^2) / 2]

    The value of a token is read from the same place as its log-prob: the state before the token.  The models share no
    parameters, so `vf_coef` scales the value model's gradient alone.

    Args:
      apply: the policy, (params, rows, *, sources) -> (hidden [B, M, D], cache, aux).
      head: policy parameters -> [D, V].
      value_apply: the value model, as `apply`.
      value_kernel: value parameters -> [D, 1].
      temperature: that of the rollout; divides the logits.
      clip_range: of the probability ratio.
      value_clip_range: of the value's move, in units of value.
      vf_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.

    Returns:
      The objective of the roles "policy" and "value" on a PolicyBatch, or of one of them.
    """

    def of_policy(params, batch: PolicyBatch) -> tuple[Terms, dict]:
        hidden, readouts, aux = read_with_aux(apply, params, batch.batch.rows, batch.batch.readouts)
        logprobs, entropy = token_logprobs(hidden, head(params), readouts, temperature=temperature, entropy=True)
        terms = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            readouts.mask,
            clip_range=clip_range,
            entropy=entropy,
            entropy_coef=entropy_coef,
        )
        return terms, aux

    def of_value(params, batch: PolicyBatch) -> tuple[Terms, dict]:
        hidden, readouts, aux = read_with_aux(value_apply, params, batch.batch.rows, batch.batch.readouts)
        values = scalar_readout(hidden, value_kernel(params), readouts)
        return value_loss(values, batch.old_values, batch.returns, readouts.mask, clip_range=value_clip_range), aux

    def terms(params, frozen, extra, statistics, batch: PolicyBatch) -> Sums:
        del frozen, extra, statistics
        weights, counts, sums = readout_weights(batch.batch), {"tokens": jnp.sum(batch.batch.readouts.mask)}, Sums({})
        for role, terms_of in (("policy", of_policy), ("value", of_value)):
            if role in params:
                found, aux = terms_of(params[role], batch)
                total = jnp.sum(found.loss * weights)
                sums = Sums(sums.terms | {role: total}, sums.metrics | found.metrics, counts, sums.aux | {role: aux})
        return sums

    def weights(batch: PolicyBatch) -> dict[str, jax.Array]:
        return dict.fromkeys(("policy", "value"), jnp.sum(readout_weights(batch.batch)))

    return Objective(weights, terms, coefs={"value": vf_coef})


def stop_on_kl(max_approx_kl: float) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The early stop of an iteration: whether the policy has moved further than this from the one that sampled.

    For `make_train_step(early_stop=...)`: the update whose minibatch exceeds it is skipped, and so are the rest of the
    iteration's (a mask: parameters and optimizer stay, the step counts); the next collection clears the flag.
    Source: OpenAI Spinning Up `ppo.py`, which stops before the update as well.

    Args:
      max_approx_kl: bound on `policy/approxkl` of a minibatch, nats a token.
    """

    def exceeded(metrics: dict[str, jax.Array]) -> jax.Array:
        return metrics["policy/approxkl"] > max_approx_kl

    return exceeded
