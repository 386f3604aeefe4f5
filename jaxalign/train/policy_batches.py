"""From what was collected to batches for the policy step: rewards of tokens, advantages, minibatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.ops.advantages import Estimator, estimator_options
from jaxalign.ops.kl import adapt_kl_coef, kl_estimate, token_rewards
from jaxalign.ops.masked import masked_mean, masked_var, whiten
from jaxalign.rewards.score_shaping import merge_statistics, shape_scores
from jaxalign.rewards.scores import combine
from jaxalign.train.collect import Collected
from jaxalign.train.minibatches import shuffle_minibatches, stream_key
from jaxalign.types import Array, Batch, PolicyBatch

# Metrics of an iteration that say nothing where no completion has a score.
OF_SCORES = ("objective/scores", "objective/scores_std", "objective/rlhf_reward", "val/explained_variance")


def make_batches(
    config: Any, estimator: Estimator, collected: Collected, extra: dict[str, Array], iteration: Array, together: int
) -> tuple[list[PolicyBatch], dict[str, Array], dict[str, Array]]:
    """`num_ppo_epochs` times `num_minibatches` batches of an iteration's completions.

        r_t = -kl_coef * kl_t + [t is the last sampled token] * shaped score + scale * the token's own score

    A completion without a score is not learned from.

    Args:
      config: of the stage: `algorithm`, `rewards`, `rollout.num_samples`, `seed`.
      estimator: of advantages, with options that are fields of `config.algorithm`; see `jaxalign.ops.advantages`.
      collected: of B completions.
      extra: of the state: the KL coefficient, running statistics of scores, the early-stop mark.
      iteration: its number, of which the minibatches' orders are made.
      together: completions of a row of training.

    Returns:
      The batches in their order, the next `extra`, metrics.
    """
    a, r = config.algorithm, config.rewards
    batch, rollout, forward = collected.batch, collected.rollout, collected.forward
    used, sampled, extra = batch.completions.mask[:, 0], rollout.sampled, dict(extra)
    scores, applies, of_tokens = combine(collected.scores)
    statistics = None
    if r.normalize:
        extra |= merge_statistics({k: v for k, v in extra.items() if k.startswith("score_")}, r.scale * scores, applies)
        statistics = {k: v for k, v in extra.items() if k.startswith("score_")}
    shaped = shape_scores(
        scores,
        applies,
        rollout.finished,
        statistics,
        scale=r.scale,
        clip=r.clip,
        missing_eos_penalty=r.missing_eos_penalty,
    )
    kl = kl_estimate(forward.logprobs, forward.ref_logprobs, a.kl_estimator)
    trained = sampled & applies[:, None]
    rewards = token_rewards(shaped, kl, trained, extra["kl_coef"])
    if of_tokens is not None:
        own = jnp.where(trained, r.scale * of_tokens, 0)
        rewards, shaped = rewards + own, shaped + jnp.sum(own, axis=1)
        scores = scores + jnp.sum(jnp.where(rollout.present, of_tokens, 0), axis=1)
    if r.whiten:
        rewards = whiten(rewards, trained, shift_mean=False)
    group = jnp.arange(len(used), dtype=jnp.int32) // config.rollout.num_samples
    options = {name: a[name] for name in estimator_options(estimator)}
    advantages, returns = estimator(rewards, trained, values=forward.values, group=group, **options)
    metrics = {}
    if forward.values is not None and returns is not None:
        left = masked_var(returns - forward.values, trained)
        metrics["val/explained_variance"] = 1 - left / jnp.maximum(masked_var(returns, trained), 1e-8)
    if a.whiten_advantages:
        advantages = whiten(advantages, trained)

    observed = masked_mean(jnp.sum(kl, axis=1), used)
    gap = forward.logprobs - rollout.logprobs
    prompts = slice(None, None, config.rollout.num_samples)  # a row of each
    prompt_lengths = batch.rows.tokens.shape[1] - batch.rows.attend_start[prompts, -1]
    metrics |= {
        "objective/kl": observed,
        "objective/kl_coef": extra["kl_coef"],
        "objective/entropy": masked_mean(jnp.sum(-forward.logprobs, axis=1), used),
        "objective/scores": masked_mean(scores, applies),
        "objective/scores_std": jnp.sqrt(masked_var(scores, applies)),
        "objective/scores_share": masked_mean(applies.astype(jnp.float32), used),
        "objective/non_score_reward": -extra["kl_coef"] * observed,
        "objective/rlhf_reward": masked_mean(shaped - extra["kl_coef"] * jnp.sum(kl, axis=1), applies),
        "rollout/eos_share": masked_mean(rollout.finished.astype(jnp.float32), used),
        "rollout/length_mean": masked_mean(jnp.sum(sampled, axis=1).astype(jnp.float32), used),
        "processed_tokens": jnp.sum(jnp.where(used[prompts], prompt_lengths, 0)) + jnp.sum(rollout.present),
        "rollout/sampler_ratio": masked_mean(jnp.exp(gap), sampled),
        "rollout/sampler_gap": jnp.max(jnp.where(sampled, jnp.abs(gap), 0)),
    }
    if a.kl_target is not None:
        extra["kl_coef"] = adapt_kl_coef(
            extra["kl_coef"], observed, jnp.sum(used), target=a.kl_target, horizon=a.kl_horizon
        )
    if "skip" in extra:
        extra["skip"] = jnp.zeros_like(extra["skip"])

    def by_row(x):
        return x.reshape(x.shape[0] // together, -1)

    learned = jnp.any(trained, axis=1) & (batch.completions.weight[:, 0] != 0)
    worth = used[prompts].astype(jnp.int32) + jnp.any(learned.reshape(-1, config.rollout.num_samples), axis=1)
    asked, ids = jax.tree.map(by_row, (batch.completions, batch.record_ids))
    readouts = collected.readouts._replace(mask=by_row(trained))
    of_tokens = (forward.logprobs, forward.ref_logprobs, forward.values, advantages, returns)
    whole = PolicyBatch(Batch(collected.rows, readouts, asked, ids), *jax.tree.map(by_row, of_tokens))
    keys = [stream_key(config.seed, iteration, 1 + epoch) for epoch in range(a.num_ppo_epochs)]
    rows = config.rollout.num_samples // together  # of a prompt
    orders = [order for key in keys for order in shuffle_minibatches(key, worth, a.num_minibatches, rows)]
    batches = [jax.tree.map(lambda x, order=order: jnp.take(x, order, axis=0), whole) for order in orders]
    return batches, extra, metrics
