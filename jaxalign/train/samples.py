"""Completions of the model in training, written for people to read and measured for signs of collapse."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import max_length
from jaxalign.disk import write_whole, writing
from jaxalign.ops.readout import read_hidden, token_logprobs
from jaxalign.parallel.device_memory import device_bytes
from jaxalign.parallel.host_memory import DEVICE, in_memory
from jaxalign.parallel.mesh import batch_shards
from jaxalign.parallel.processes import is_main
from jaxalign.parallel.sharding import batch_part, put_batch
from jaxalign.rollout.completed import Rollout, completed_rows
from jaxalign.rollout.continuous import roll_out
from jaxalign.rollout.engine import end_markers, without_marker
from jaxalign.rollout.host import all_rows
from jaxalign.rollout.sampling import Sampling
from jaxalign.train.compiled import memory_errors
from jaxalign.train.health import sample_signs
from jaxalign.train.stage import Stage
from jaxalign.types import Params, Rows, TrainState


class Sampler:
    """Writes `samples/STEP.jsonl`: the completions that an online algorithm has sampled, or of held-out prompts.

    Held-out prompts are the same at every step, and so are the random keys: what changes is the model.
    """

    def __init__(self, stage: Stage):
        """
        Args:
          stage: data, models and compiled steps.
        """
        self._stage = stage
        self._count = stage.config.logging.num_samples

    def __call__(
        self, state: TrainState, frozen: dict[str, Params], step: int, samples: list[dict[str, Any]] | None
    ) -> dict[str, float]:
        """Writes the samples of this step.

        Args:
          state: with whole models.
          frozen: by role.
          step: batches done.
          samples: this process's completions of the step's own prompts; None: held-out prompts are completed.

        Returns:
          Signs of collapse, `samples/...`.
        """
        if samples is not None:
            rows, signs = samples[: self._count * self._stage.config.rollout.num_samples], {}
        else:
            rows, signs = self._generate(state, frozen)
        folder = self._stage.directory.samples
        if is_main() and rows:
            text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / f"{step}.jsonl", text)
        return signs

    def _generate(self, state: TrainState, frozen: dict[str, Params]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        stage, c = self._stage, self._stage.config
        examples, batch = self._prompts
        with memory_errors("sampling"):
            model, params = stage.program.trained["policy"].model, state.params["policy"]
            most = min(c.rollout.max_new_tokens, max_length(c))
            if model.config.num_positions is not None:
                most = min(most, model.config.num_positions - max(len(example.prompt) for example in examples))
            rollout, _ = roll_out(
                model,
                params,
                batch.rows,
                jax.random.key(c.seed),
                batch.record_ids[:, 0],
                sampling=Sampling.of(c.rollout, max_new_tokens=most).of_tokens(
                    stage.tokenizer, model.config.vocab_size
                ),
                stop_ids=stage.stop_ids,
                mesh=stage.mesh,
                tensor=c.rollout.tensor,
                held=device_bytes((state, frozen)),
            )
            tokens, mask, _, logprobs, finished = (all_rows(x) for x in rollout)
        ids = [t[m].tolist() for t, m in zip(tokens, mask, strict=True)][: len(examples)]
        markers = end_markers(stage.tokenizer, stage.stop_ids)
        rows = [
            {
                "record": int(example.record),
                "prompt": stage.tokenizer.decode(example.prompt.tolist()),
                "completion": stage.tokenizer.decode(without_marker(sample, markers), skip_special_tokens=True),
                "finished": bool(done),
                "num_tokens": len(sample),
            }
            for example, sample, done in zip(examples, ids, finished, strict=False)
        ]
        spread = [p[m].tolist() for p, m in zip(logprobs, mask, strict=True)][: len(examples)]
        signs = sample_signs(ids, finished=finished[: len(examples)].tolist(), logprobs=spread)
        if "ref" in frozen:
            with memory_errors("sampling"):
                kl = self._kl(params, in_memory(frozen["ref"], DEVICE), batch.rows, rollout)
            signs["samples/kl"] = float(np.mean(all_rows(kl)[: len(examples)]))
        return rows, signs

    @functools.cached_property
    def _kl(self) -> Callable[[Params, Params, Rows, Rollout], jax.Array]:
        """log pi - log pi_ref of each sampled completion, [B], nats: its mean estimates their KL."""
        program = self._stage.program
        policy, of_ref = program.trained["policy"].model, program.frozen["ref"].model
        temperature = float(self._stage.config.rollout.temperature) or 1.0

        def compare(params, ref, rows, rollout):
            rows, readouts = completed_rows(rows, rollout)

            def logprobs(model, params):
                hidden, at = read_hidden(model.apply, params, rows, readouts)
                return token_logprobs(hidden, model.head(params), at, temperature=temperature)[0]

            return jnp.sum(logprobs(policy, params) - logprobs(of_ref, ref), axis=1)

        return jax.jit(compare)

    @functools.cached_property
    def _prompts(self) -> tuple[list[Any], Any]:
        """The first prompts of the held-out data (else of the training data), on the mesh."""
        from jaxalign.data.rows import Shape, build_prompts, round_up

        stage = self._stage
        dataset = stage.eval_dataset or stage.dataset
        examples = [dataset.example(i) for i in range(min(self._count, dataset.num_records))]
        index, parts = batch_part(stage.mesh)
        count = round_up(len(examples), batch_shards(stage.mesh))
        # Rows that only fill the mesh repeat the first prompts: a row of padding alone has nothing to continue.
        filled = [examples[i % len(examples)] for i in range(count)]
        length = round_up(max(len(e.prompt) for e in filled), 8)
        local = filled[index * count // parts : (index + 1) * count // parts]
        batch = build_prompts(local, Shape(len(local), length, 0, 1), dataset.pad_id)
        return examples, put_batch(batch, stage.mesh)


def masked_text(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Text in which the runs of tokens that are scored stand in brackets, `⟦so⟧`."""
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            part = tokenizer.decode(tokens[start:end].tolist())
            text += f"⟦{part}⟧" if mask[start] else part
            start = end
    return text
