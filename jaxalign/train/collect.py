"""Collection: from prompts to completions, their log-probs and their scores, whatever is learned from them.

    collector = Collector(config, policy=Model, reward=..., records=dataset.record, tokenizer=..., stop_ids=(2,),
                          mesh=mesh)
    collected, lines, metrics = collector.collect(params, frozen, batch, iteration, step)

`rollout.num_samples` completions of each prompt, neighbours in every array; decoded text where the reward reads text;
log-probs of policy and reference by the training forward at the sampling temperature, and values where there is a value
model.  Every result is a function of (params, batch, seed, iteration).  Frozen weights that wait in the host's memory
are on the devices only while they score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.data.records import Record
from jaxalign.models.transformer import Model
from jaxalign.ops.readout import read_hidden, scalar_readout, token_logprobs
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.device_memory import device_bytes, device_limit
from jaxalign.parallel.host_memory import DEVICE, in_memory
from jaxalign.parallel.processes import is_main
from jaxalign.parallel.sharding import batch_sharding, put_batch
from jaxalign.rewards.model import ModelScorer, require_finite, score_rows
from jaxalign.rewards.samples import Samples, Scorer
from jaxalign.rewards.scores import Scores, by_part, one_part, score_arrays, totals
from jaxalign.rollout.completed import Rollout, completed_rows
from jaxalign.rollout.continuous import roll_out
from jaxalign.rollout.host import all_rows, local_rows
from jaxalign.rollout.layout import Split, decoding_mesh, fewest_parts, split_of
from jaxalign.rollout.pairs import completions_per_row, last_columns, paired_rows
from jaxalign.rollout.sampling import Sampling
from jaxalign.rollout.sizes import cache_width
from jaxalign.rollout.slots import repeat_rows
from jaxalign.train.minibatches import in_parts, stream_key
from jaxalign.train.texts import read_samples, sample_lines, text_metrics
from jaxalign.types import Array, Batch, Params, Readouts, Rows


class Forward(NamedTuple):
    """What the training forward says of the completions, [B, R] each, however they lie in rows; 0 where not sampled."""

    logprobs: Array  # of the policy, nats, at the sampling temperature
    ref_logprobs: Array  # of the reference, likewise
    values: Array | None  # None without a value model


class Collected(NamedTuple):
    """An iteration's completions and what is known of them, B of them, `together` in each row of training."""

    batch: Batch  # the prompt of each
    rollout: Rollout
    rows: Rows  # [B / together, T], prompts and completions
    readouts: Readouts  # [B / together, R * together], where their sampled tokens are predicted
    forward: Forward
    scores: Scores


class Collector:
    """Collects completions of batches of prompts.

    Args:
      config: of the stage: `rollout`, `batch_size`, `seed`.
      policy: of `params["policy"]`.
      reward: a Model of `frozen["reward"]` that reads the policy's own tokens; a ModelScorer, likewise, that has
        another tokenizer and reads text; or any other Scorer, such as a FunctionScorer.  See `rewards.load`.
      records: from a record's number to the record of the training data.
      tokenizer: of the policy.
      stop_ids: the tokens that end a completion.
      mesh: where everything lies.
      value: of `params["value"]`, with a scalar head; None without a critic.
      parts: in how many parts the forward passes are made, at most: in as few as fit, where the memory is known.
      weights: of the reward's parts by name; 1 for one that is not there.
      ref: of `frozen["ref"]`: without an adapter, with one of its own, or in fewer bits; None: the policy's model.
    """

    def __init__(
        self,
        config: Any,
        *,
        policy: Model,
        reward: Model | ModelScorer | Scorer,
        records: Callable[[int], Record],
        tokenizer: Any,
        stop_ids: tuple[int, ...],
        mesh: Mesh,
        value: Model | None = None,
        parts: int = 1,
        weights: Mapping[str, float] | None = None,
        ref: Model | None = None,
    ):
        self.config, self.policy, self.value, self.reward = config, policy, value, reward
        self.ref = ref or policy
        self.records, self.tokenizer, self.stop_ids, self.mesh = records, tokenizer, tuple(stop_ids), mesh
        self.sampling = Sampling.of(config.rollout).of_tokens(tokenizer, policy.config.vocab_size)
        self.num_samples = config.rollout.num_samples
        self.together = completions_per_row(self.num_samples)
        self.roles = ("policy",) if value is None else ("policy", "value")
        if config.rollout.tensor is not None:
            decoding_mesh(mesh, config.rollout.tensor)  # or it is refused
        self.parts, self._weights = parts, dict(weights or {})
        self.limit = device_limit(mesh)  # bytes of each device
        self._said = False
        rows = batch_sharding(mesh)
        self.ask = jax.jit(self._ask_for_each, out_shardings=rows)
        self.complete = jax.jit(paired_rows if self.together == 2 else completed_rows, out_shardings=rows)
        self.score = jit(self._score_completions, static_argnames=("parts",), out_shardings=rows)
        self.forward = jit(self._forward_passes, static_argnames=("parts",), out_shardings=rows)

    def collect(
        self,
        params: dict[str, Params],
        frozen: dict[str, Params],
        batch: Batch,
        iteration: Array,
        step: int,
        records: Callable[[int], Record] | None = None,
        held: int | None = None,
    ) -> tuple[Collected, list[dict[str, Any]], dict[str, float]]:
        """Completions, scores and forward passes of one batch of prompts.

        Args:
          params: by role: those that are trained.
          frozen: by role.
          batch: prompts on the mesh.
          iteration: its number, of which the random keys are made.
          step: optimizer updates made so far.
          records: from a record's number to the record of the set that the batch is from; None: the training data.
          held: bytes of weights and moments on each device meanwhile; None: those of the policy alone.

        Returns:
          What was collected, this process's completions as lines for the log, metrics.
        """
        c = self.config
        prompts = batch.rows
        batch, sample_ids = self.ask(batch)
        rollout, figures = roll_out(
            self.policy,
            params["policy"],
            prompts,
            stream_key(c.seed, iteration, 0),
            sample_ids,
            num_slots=c.rollout.num_slots,
            mesh=self.mesh,
            tensor=c.rollout.tensor,
            held=held,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
        )
        self._say(int(figures["tensor"]))
        rows, readouts = jax.block_until_ready(self.complete(batch.rows, rollout))
        sampled = time.perf_counter()
        on_device = isinstance(self.reward, Model)
        if on_device:
            reward = in_memory(frozen["reward"], DEVICE)
            given = self.score(
                reward,
                rows,
                last_columns(batch.rows, rollout.present, self.together),
                parts=self.scored_in(rows, _beside(held, frozen["reward"], reward)),
            )
            del reward
        ref = in_memory(frozen["ref"], DEVICE)
        forward = self.forward(
            {role: params[role] for role in self.roles},
            ref,
            rows,
            readouts,
            parts=self.parts_of(rows, _beside(held, frozen["ref"], ref)),
        )  # the devices work on while the host scores
        del ref
        samples, texts, used = read_samples(
            batch,
            rollout,
            step,
            records=records or self.records,
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
        )
        if on_device:
            said = by_part(local_rows(given)[used].tolist())
            scores = one_part(given, batch.completions.mask[:, 0])
        else:
            said = by_part(self._score_on_host(frozen, samples, len(used), rows, held))
            scores = put_batch(score_arrays(said, self._weights, used, local_rows(rollout.present)), self.mesh)
        if isinstance(self.reward, (Model, ModelScorer)):  # of all processes, so that all of them stop
            places = [f"record {i}" for i in all_rows(batch.record_ids)[:, 0]]
            there = zip(all_rows(scores.values)[:, 0].tolist(), all_rows(scores.applies)[:, 0], strict=True)
            require_finite([s if here else None for s, here in there], places, "rewards.model")
        total = totals(said, self._weights)
        metrics = text_metrics(rollout, samples, total) | {
            "rollout/slot_occupancy": figures["slot_occupancy"],
            "rollout/tensor": figures["tensor"],
            "time/prefill": figures["time/prefill"],
            "time/decode": figures["time/decode"],
            "time/scoring": time.perf_counter() - sampled,
        }
        lines = sample_lines(samples, texts, total, said if len(said) > 1 else {})
        return Collected(batch, rollout, rows, readouts, forward, scores), lines, metrics

    def _score_on_host(
        self, frozen: dict[str, Params], samples: Samples, count: int, rows: Rows, held: int | None
    ) -> Any:
        """Scores by a function, or by a model that reads text: of about as many tokens as the rows have."""
        if isinstance(self.reward, ModelScorer):
            reward = in_memory(frozen["reward"], DEVICE)
            parts = self.scored_in(rows, _beside(held, frozen["reward"], reward))
            return self.reward.scores(reward, samples, count, parts).tolist()
        assert not isinstance(self.reward, Model)
        return self.reward(samples) if samples.prompts else []

    def parts_of(self, rows: Rows, held: int | None) -> int:
        """In how many parts the forward passes of these rows are made.

        Args:
          rows: [B, T], or their shapes.
          held: as `collect` takes it.
        """
        return self._fewest([model for model in (self.policy, self.value) if model is not None], rows, held)

    def scored_in(self, rows: Rows, held: int | None) -> int:
        """In how many parts a reward model scores these rows: at least one for each batch of prompts.

        Args:
          rows: [B, T], or their shapes.
          held: as `collect` takes it.
        """
        model = self.reward.model if isinstance(self.reward, ModelScorer) else self.reward
        return max(self._fewest([model], rows, held), rows.tokens.shape[0] // self.config.batch_size)

    def _fewest(self, models: list[Any], rows: Rows, held: int | None) -> int:
        if held is None:
            return self.parts
        return max(fewest_parts(model, self.mesh, rows.tokens.shape, self.parts, held, self.limit) for model in models)

    def split(self, prompts: tuple[int, int], held: int) -> Split:
        """How the weights lie while completions are sampled.

        Args:
          prompts: [B, P].
          held: bytes of weights and moments on each device meanwhile.
        """
        c, total = self.config.rollout, prompts[0] * self.num_samples
        slots, columns = min(c.num_slots or total, total), cache_width(prompts[1] + c.max_new_tokens)
        return split_of(self.policy, self.mesh, c.tensor, slots=slots, columns=columns, held=held, limit=self.limit)

    def _say(self, tensor: int) -> None:
        """Says once how the weights lie while completions are sampled, where there is a choice."""
        if not self._said and self.mesh.size > 1 and is_main():
            how = Split(tensor, "", {}).words
            print(f"completions are sampled with {how} (rollout.tensor={tensor})")
        self._said = True

    # What runs on the mesh

    def _ask_for_each(self, batch: Batch) -> tuple[Batch, Array]:
        """The prompt of each completion, those of a prompt neighbours, and the completions' numbers (-1: unused).

        With one completion a prompt, its number is the record's.
        """
        count = self.num_samples
        batch = repeat_rows(batch, count)
        used, ids = batch.completions.mask[:, 0], batch.record_ids[:, 0]
        return batch, jnp.where(used, ids * count + jnp.arange(len(ids), dtype=ids.dtype) % count, -1)

    def _score_completions(self, params: Params, rows: Rows, last: Array, parts: int | None = None) -> Array:
        """A reward model's score at each completion's last token, in so many parts; None: as forward passes take it."""
        found = in_parts(lambda part: score_rows(self.reward, params, *part), (rows, last), parts or self.parts)
        return found.reshape(-1)

    def _forward_passes(
        self, params: dict[str, Params], ref: Params, rows: Rows, readouts: Readouts, parts: int | None = None
    ) -> Forward:
        """Log-probs and values, in so many parts; None: as many rows at a time as a training step takes."""
        temperature, value = float(self.config.rollout.temperature), self.value

        def logprobs(model, params, rows, readouts):
            hidden, readouts = read_hidden(model.apply, params, rows, readouts)
            return token_logprobs(hidden, model.head(params), readouts, temperature=temperature)[0]

        def values(params, rows, readouts):
            hidden, at = read_hidden(value.apply, params, rows, readouts)
            return scalar_readout(hidden, value.score_kernel(params), at)

        def micro(part):
            rows, readouts = part
            return Forward(
                logprobs(self.policy, params["policy"], rows, readouts),
                logprobs(self.ref, ref, rows, readouts),
                None if value is None else values(params["value"], rows, readouts),
            )

        found = in_parts(micro, (rows, readouts), parts or self.parts)
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * self.together, -1), found)


def _beside(held: int | None, kept: Params, on_device: Params) -> int | None:
    """Bytes held on each device with parameters that may have been brought from the host's memory."""
    return None if held is None else held + device_bytes(on_device) - device_bytes(kept)
