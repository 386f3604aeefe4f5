"""Reward models: a scalar score at the last real token of prompt and completion."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxalign.data.records import Record
from jaxalign.data.template_inputs import inputs_of
from jaxalign.data.tokenize import Dropped, Encoder, tokenize_records
from jaxalign.errors import InputError
from jaxalign.models.transformer import Model
from jaxalign.ops.readout import read_hidden, scalar_readout
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.sharding import put_batch
from jaxalign.rewards.samples import Samples
from jaxalign.rollout.host import local_rows
from jaxalign.types import Array, CausalByIndex, Params, Readouts, Rows

_NONE: Mapping[str, Any] = {}
_LEAST_WIDTH = 32  # row lengths are powers of two from here on, so that few shapes are compiled


@functools.partial(jit, static_argnames="model")
def score_rows(model: Model, params: Params, rows: Rows, last: Array) -> Array:
    """Scores of rows, each read at a given row index.

    Args:
      model: with a scalar head.
      params: its parameters.
      rows: [B, T], padded on either side.
      last: int32 [B], row index of the last real token; or [B, C], of each sequence in a row.

    Returns:
      float32, of the shape of `last`.
    """
    chex.assert_rank([rows.tokens, last], [2, {1, 2}])
    source = last.reshape(len(last), -1)
    readouts = Readouts(source, jnp.zeros_like(source), jnp.zeros_like(source), jnp.ones(source.shape, bool))
    hidden, readouts = read_hidden(model.apply, params, rows, readouts)
    return scalar_readout(hidden, model.score_kernel(params), readouts).reshape(last.shape)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids for every text and render messages alike.

    Args:
      one: a `transformers` tokenizer.
      other: another.
    """
    if one is other:
        return True
    if getattr(one, "chat_template", None) != getattr(other, "chat_template", None):
        return False
    if one.get_vocab() != other.get_vocab() or one.all_special_ids != other.all_special_ids:
        return False
    backends = [getattr(t, "backend_tokenizer", None) for t in (one, other)]
    if None in backends:
        return type(one) is type(other)
    return backends[0].to_str() == backends[1].to_str()


class ModelScorer:
    """Scores text by a reward model with its own tokenizer: rendered by its own template, tokenised anew.

    Args:
      model: with a scalar head.
      tokenizer: the reward model's.
      params: its parameters; None where every call brings them.
      mesh: where rows are placed; None: one device.
      batch_size: rows at a time when called as a Scorer; with a mesh, of this process.
      stop_ids: every id that ends a completion of the reward model, as its training had them (`tokenizer.stop_ids`);
        the tokenizer's own is always among them.
      plain: renderer of messages where the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        params: Params | None = None,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 32,
        stop_ids: Iterable[int] = (),
        plain: Any = None,
        name: str = "the reward model",
    ):
        self.model, self.params, self.mesh, self.batch_size, self.name = model, params, mesh, batch_size, name
        self.encoder = Encoder(tokenizer, stop_ids, plain)

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores in the order of the samples, `batch_size` at a time.

        Raises:
          InputError: a score that is not finite.
        """
        count, size = len(samples.completions), self.batch_size
        found: list[float | None] = []
        for start in range(0, count, size):
            here = slice(start, start + size)
            part = Samples(
                samples.prompts[here],
                samples.completions[here],
                samples.completion_ids[here],
                samples.finished[here],
                samples.records[here],
                samples.step,
            )
            found += self.scores(self.params, part, size).tolist()
        require_finite(found, [f"{r.source}:{r.line}" for r in samples.records], self.name)
        return found

    def scores(self, params: Params, samples: Samples, rows: int, parts: int = 1) -> np.ndarray:
        """Scores of at most `rows` samples, padded alike; every process calls with the same number of rows.

        Args:
          params: of the reward model.
          samples: prompts (text or messages), completions and whether they finished, N of each.
          rows: of this process's part of the batch; those beyond the samples are filled.
          parts: of the rows, one of which goes through the model at a time.

        Returns:
          float32 [N].
        """
        sequences = [
            self.tokens(prompt, completion, finished, record.columns)
            for prompt, completion, finished, record in zip(
                samples.prompts, samples.completions, samples.finished, samples.records, strict=True
            )
        ]
        filled = sequences + [np.zeros(1, np.int32)] * (rows - len(sequences))
        batch, last = padded_rows(filled)
        model = self.model.for_length(int(last.max()) + 1)  # in a run its longest sequence is stated
        scores = []
        for here in np.split(np.arange(rows), parts):
            some = jax.tree.map(lambda x, here=here: x[here], (batch, last))
            if self.mesh is None:
                scores.append(np.asarray(score_rows(model, params, *some)))
            else:
                with jax.set_mesh(self.mesh):
                    scores.append(local_rows(score_rows(model, params, *put_batch(some, self.mesh))))
        return np.concatenate(scores)[: len(sequences)]

    def tokens(self, prompt: Any, completion: str, finished: bool, columns: Mapping[str, Any] = _NONE) -> np.ndarray:
        """Prompt and completion in the reward model's own template, with an end of turn only where it finished.

        The end is what its template writes at the end of a turn, up to a stop id; without one, the tokenizer's EOS.

        Args:
          prompt: text or messages.
          completion: text.
          finished: whether a stop token ended it.
          columns: of the record; a template may show its `tools`.
        """
        encoder, eos = self.encoder, self.encoder.eos_id
        said = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
        record = Record(0, "a completion", 1, "completion", prompt=prompt, completion=said, columns=dict(columns))
        example = next(tokenize_records([record], encoder, append_eos=False))
        if isinstance(example, Dropped):  # no text: the prompt and an end
            example = next(tokenize_records([record._replace(form="prompt")], encoder, append_eos=False))
            if isinstance(example, Dropped):
                raise ValueError("a reward model cannot score an empty prompt with an empty completion")
            ids = example.prompt
            end = int(self.tokens(prompt, "a", True, columns)[-1]) if finished else None  # as behind words
            return np.append(ids, end).astype(np.int32) if end in encoder.eos_ids else ids
        ids = np.concatenate([example.prompt, example.completions[0]])
        if example.complete[0] and not finished:
            ids = ids[:-1]
        elif not finished and not isinstance(said, str) and not encoder.template.is_plain:
            # The template has no stop id at the end of a turn: what it appends would look like one.
            shown = encoder.template.conversation([*prompt, *said], len(prompt), inputs_of(columns))
            ids = encoder.ids(shown.text[: shown.words_end[-1]], templated=True)
        if not example.complete[0] and finished and eos is not None:
            ids = np.append(ids, eos)
        return ids.astype(np.int32)


def require_finite(scores: Iterable[float | None], places: Sequence[str], name: str) -> None:
    """Refuses scores that are not finite.

    Args:
      scores: None where there is none.
      places: what each is of, for the message.
      name: of the reward model.

    Raises:
      InputError: naming the first.
    """
    bad = [(p, s) for p, s in zip(places, scores, strict=True) if s is not None and not math.isfinite(s)]
    if bad:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise InputError(
            f"the score of {bad[0][0]}{more} by {name} is {bad[0][1]}",
            "finite scores: a reward model whose weights are finite, in a dtype that holds its numbers",
            "another --config.rewards.model; --config.model.dtype=float32 where it was float16",
        )


def padded_rows(sequences: list[np.ndarray]) -> tuple[Rows, np.ndarray]:
    """Token sequences as causal rows padded on the right, one a row, their width a power of two.

    Args:
      sequences: int32 arrays, each of at least one token.

    Returns:
      Rows [N, T] of numpy arrays and the row index of each last token, int32 [N].
    """
    longest = max(len(s) for s in sequences)
    if jax.process_count() > 1:  # all processes must compile the same shapes
        longest = int(multihost_utils.process_allgather(np.int32(longest)).max())
    width = max(_LEAST_WIDTH, 1 << (longest - 1).bit_length())
    lengths = np.array([len(s) for s in sequences], np.int32)
    place = np.arange(width, dtype=np.int32)[None].repeat(len(sequences), 0)
    real = place < lengths[:, None]
    tokens = np.zeros_like(place)
    tokens[real] = np.concatenate(sequences)
    rows = Rows(
        tokens=tokens,
        positions=np.where(real, place, 0),
        attend_start=np.where(real, 0, place),  # padding sees itself
        attend_end=place + 1,
        causal=CausalByIndex(),
    )
    return rows, lengths - 1
