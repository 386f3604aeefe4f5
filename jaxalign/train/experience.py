"""Experience for PPO: collect completions of prompts, make batches of them.

    prepare = make_prepare(config, policy=Model, value=Model, reward=..., records=dataset.record, tokenizer=...,
                           stop_ids=(2,), mesh=mesh, ref=Model)
    state.extra |= initial_extra(config)
    state, batches, metrics, samples = prepare(state, frozen, batch)  # frozen: {"ref", "reward" where it is a model}
    for minibatch in batches: state, ... = step(state, frozen, minibatch)

Every result is a function of (state, batch, seed); the iteration's number is `state.data_cursor`, whatever it counts.
`state` is read here only, before the first step may donate it, and comes back with a new `extra`: KL coefficient,
running statistics of scores, and the early-stop mark cleared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.records import Record
from jaxalign.errors import InputError
from jaxalign.models.transformer import Model
from jaxalign.ops.advantages import ESTIMATORS, Estimator
from jaxalign.parallel.device_memory import device_bytes
from jaxalign.parallel.sharding import batch_sharding, replicated
from jaxalign.rewards.model import ModelScorer
from jaxalign.rewards.samples import Scorer
from jaxalign.rewards.score_shaping import initial_statistics
from jaxalign.rewards.scores import combine, one_part
from jaxalign.rollout.completed import Rollout
from jaxalign.rollout.host import all_rows
from jaxalign.train.collect import Collector, Forward
from jaxalign.train.compiled import memory_errors
from jaxalign.train.minibatches import check_rows
from jaxalign.train.policy_batches import OF_SCORES, make_batches
from jaxalign.train.prepare import Prepared
from jaxalign.types import Array, Batch, Params, TrainState

_EVAL_STREAM = 2**31 - 1  # the iteration number whose keys evaluation uses


def initial_extra(config: Any) -> dict[str, Array]:
    """What PPO keeps in the state beside parameters and optimizer.

    Args:
      config: of the stage.
    """
    extra = {"kl_coef": jnp.float32(config.algorithm.kl_coef)}
    if config.rewards.normalize:
        extra |= initial_statistics()
    if config.algorithm.max_approx_kl is not None:
        extra["skip"] = jnp.array(False)
    return extra


def make_prepare(
    config: Any,
    *,
    policy: Model,
    value: Model | None,
    reward: Model | ModelScorer | Scorer,
    records: Callable[[int], Record],
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    mesh: Mesh,
    estimator: str | Estimator = "gae",
    ref: Model | None = None,
) -> Experience:
    """The collection of experience for one stage.

    Args:
      config: of the stage: `algorithm`, `rollout`, `rewards`, `batch_size`, `grad_accum_steps`, `seed`.
      policy: of `state.params["policy"]`.
      value: of `state.params["value"]`, with a scalar head; None where the estimator needs no values.
      reward: see `Collector`.
      records: from a record's number to the record of the training data.
      tokenizer: of the policy.
      stop_ids: the tokens that end a completion.
      mesh: where everything lies.
      estimator: of advantages, by its name or itself.
      ref: of `frozen["ref"]`; None: the policy's model.

    Returns:
      prepare(state, frozen, batch) -> Prepared; batch: prompts on the mesh.

    Raises:
      InputError: rows that minibatches, micro-batches or the mesh do not divide.
    """
    check_rows(config, mesh)
    minibatches, accumulation = config.algorithm.num_minibatches, config.grad_accum_steps
    collector = Collector(
        config,
        policy=policy,
        ref=ref,
        value=value,
        reward=reward,
        records=records,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        mesh=mesh,
        parts=minibatches * accumulation,
    )
    return Experience(config, collector, ESTIMATORS[estimator] if isinstance(estimator, str) else estimator)


class Experience:
    """See `make_prepare`."""

    def __init__(self, config: Any, collector: Collector, estimator: Estimator):
        self.config, self.collector, self.estimator = config, collector, estimator
        rows, whole = batch_sharding(collector.mesh), replicated(collector.mesh)
        self.batches = jax.jit(self._batches, out_shardings=(rows, whole, whole))

    def __call__(self, state: TrainState, frozen: dict[str, Params], batch: Batch) -> Prepared:
        """One iteration's experience; metrics are scalars, some of them still on their way from the device.

        Raises:
          InputError: a whole batch, every row a prompt, without any score.  A batch that an epoch's end left smaller
            may have none: its updates change nothing, and its metrics are those that need no score.
        """
        mesh = self.collector.mesh
        with jax.set_mesh(mesh), memory_errors("collection of experience"):
            extra = jax.device_put(state.extra, replicated(mesh))
            held = device_bytes((state.params, state.opt, frozen))
            collected, samples, metrics = self.collector.collect(
                state.params, frozen, batch, state.data_cursor, int(state.step), held=held
            )
            batches, extra, more = self.batches(collected, extra, state.data_cursor)
            if not all_rows(collected.scores.applies).any():
                if all_rows(batch.completions.mask).all():
                    raise InputError(
                        "the reward gave None for every completion of a batch",
                        "a score for some",
                        "a reward that applies to these prompts: --config.rewards.function=... or "
                        "--config.data.sources=...",
                    )
                more = {name: value for name, value in more.items() if name not in OF_SCORES}
        return Prepared(state._replace(extra=extra), batches, metrics | more, samples)

    def _batches(self, collected, extra, iteration):
        return make_batches(self.config, self.estimator, collected, extra, iteration, self.collector.together)

    def evaluate(
        self, state: TrainState, frozen: dict[str, Params], batch: Batch, records: Callable[[int], Record]
    ) -> dict[str, Any]:
        """Scores, KL and length of each prompt's completions: {name: (sum, weight)}, to be added up over batches.

        The keys are the same at every evaluation.

        Args:
          state: whose policy is asked.
          frozen: by role.
          batch: prompts on the mesh.
          records: from a record's number to the record, of the set that the batch is from.
        """
        mesh = self.collector.mesh
        with jax.set_mesh(mesh), memory_errors("evaluation of samples"):
            stream = jax.device_put(np.int32(_EVAL_STREAM), replicated(mesh))
            held = device_bytes((state.params, state.opt, frozen))
            found, _, _ = self.collector.collect(state.params, frozen, batch, stream, int(state.step), records, held)
            used = found.batch.completions.mask[:, 0]
            return _eval_sums(used, found.rollout, found.forward, found.scores)


@jax.jit
def _eval_sums(used, rollout, forward, scores) -> dict[str, tuple[Array, Array]]:
    """(sum, weight) over completions."""
    of_each = {
        "objective/kl": jnp.sum(forward.logprobs - forward.ref_logprobs, axis=1),
        "objective/entropy": jnp.sum(-forward.logprobs, axis=1),
        "rollout/eos_share": rollout.finished,
        "rollout/length_mean": jnp.sum(rollout.sampled, axis=1),
    }
    count = jnp.sum(used).astype(jnp.float32)
    sums = {name: (jnp.sum(jnp.where(used, x, 0)).astype(jnp.float32), count) for name, x in of_each.items()}
    score, applies, of_tokens = combine(scores)
    if of_tokens is not None:
        score = score + jnp.sum(jnp.where(rollout.present, of_tokens, 0), axis=1)
    sums["objective/scores"] = jnp.sum(jnp.where(applies, score, 0)), jnp.sum(applies).astype(jnp.float32)
    return sums


def eval_metrics() -> list[str]:
    """The names of what `Experience.evaluate` measures, whatever the batch."""
    number, truth, one = np.zeros((1, 1), np.float32), np.zeros((1, 1), bool), np.zeros(1, bool)
    rollout = Rollout(np.zeros((1, 1), np.int32), truth, truth, number, one)
    scores = one_part(number[:, 0], one)
    return sorted(jax.eval_shape(_eval_sums, one, rollout, Forward(number, number, None), scores))
