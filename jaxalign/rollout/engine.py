"""The generation engine: tokenise prompts, decode, detokenise."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.dialogues import render_plain
from jaxalign.data.records import Record
from jaxalign.data.tokenize import Dropped, Encoder, tokenize_records
from jaxalign.errors import InputError
from jaxalign.models.transformer import Model
from jaxalign.rollout.continuous import continue_prompts
from jaxalign.rollout.driver import OnTokens
from jaxalign.rollout.sampling import Sampling
from jaxalign.types import Params

_JOINED = 8  # characters at the end of a text that tokenizers may yet join to those before


class Completion(NamedTuple):
    """One completion as text."""

    text: str  # without special tokens and the end; for a prompt of text, prompt + text is the whole text
    ids: list[int]  # the stop token included
    logprob: float  # nats, summed, at the sampling temperature (1 where that is 0)
    finished: bool  # ended by a stop token


class Generator:
    """Generates text from a model.

    Prompts wait by length for one of `batch_size` slots, and shapes are few, so that few programs are compiled.
    Equal prompts are prefilled once.  A completion depends on its prompt, the seed and its place in the list
    alone.

    `stats` says how the last call went: `tokens_per_second`, `slot_occupancy` (the share of the slots' steps that gave
    a token), `time/prefill` and `time/decode` in seconds.

    Args:
      model: with a token head.
      params: its parameters; with a mesh, on it.
      tokenizer: of transformers.
      stop_ids: the tokens that end a completion (`jaxalign.models.tokenizer.stop_ids`).
      sampling: how, and how many tokens at most.
      batch_size: completions at a time, at most.
      columns: that prompts are given at least, as `continue_prompts` takes it.
      mesh: where it runs; None: one device.  With several processes each calls with the same prompts.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        sampling: Sampling,
        batch_size: int = 32,
        columns: int = 0,
        mesh: Mesh | None = None,
    ):
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.batch_size, self._columns = batch_size, columns
        self.stats: dict[str, float] = {}
        self._encoder = Encoder(tokenizer, stop_ids, render_plain)
        self._sampling = sampling.of_tokens(tokenizer, model.config.vocab_size)
        self._stop_ids = tuple(int(i) for i in stop_ids)
        self._markers = end_markers(tokenizer, self._stop_ids)

    def __call__(self, prompts: Sequence[str | list[dict[str, Any]] | Record], *, seed: int) -> list[Completion]:
        """Continues each prompt once.

        Args:
          prompts: texts, which get the tokenizer's own special tokens, or lists of messages, which are rendered by the
            chat template up to where the assistant speaks; or records of the form prompt, whose columns (tools,
            chat_template_kwargs) the template gets too.
          seed: of the samples.

        Returns:
          Completions in the order of the prompts.

        Raises:
          InputError: a prompt without tokens.
        """
        tokenised = self.encode(prompts)
        found = self.continue_ids(tokenised, seed=seed)
        return [
            c._replace(text=continuation(self.tokenizer, ids, without_marker(c.ids, self._markers)))
            if isinstance(prompt.prompt if isinstance(prompt, Record) else prompt, str)
            else c
            for prompt, ids, c in zip(prompts, tokenised, found, strict=True)
        ]

    def encode(self, prompts: Sequence[str | list[dict[str, Any]] | Record]) -> list[np.ndarray]:
        """Prompts as the token ids that `__call__` continues.

        Args:
          prompts: as there.

        Raises:
          InputError: a prompt without tokens.
        """
        records = [
            p._replace(index=i) if isinstance(p, Record) else Record(i, "prompts", i + 1, "prompt", prompt=p)
            for i, p in enumerate(prompts)
        ]
        tokenised = []
        for item in tokenize_records(records, self._encoder, append_eos=False):
            if isinstance(item, Dropped):
                raise InputError(
                    f"prompt {item.record} has no token: {item.reason}", "a text", "a prompt that says something"
                )
            tokenised.append(item.prompt)
        return tokenised

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        seed: int,
        num_samples: int = 1,
        on_tokens: OnTokens | None = None,
    ) -> list[Completion]:
        """Continues token ids, as they are; the texts are those of the new ids alone.

        Args:
          prompts: of at least one token each.
          seed: of the samples.
          num_samples: completions of each prompt.
          on_tokens: is called with a completion's place in the list and its new tokens, every few steps.

        Returns:
          Completions in the order of the prompts, those of one prompt after each other.
        """
        longest = max((len(prompt) for prompt in prompts), default=0) + self._sampling.max_new_tokens
        found, self.stats = continue_prompts(
            self.model.for_length(longest),
            self.params,
            [np.asarray(p, np.int32) for p in prompts],
            jax.random.key(seed),
            num_samples=num_samples,
            num_slots=self.batch_size,
            mesh=self.mesh,
            sampling=self._sampling,
            stop_ids=self._stop_ids,
            columns=self._columns,
            on_tokens=on_tokens,
        )
        said = [without_marker(s.ids, self._markers) for s in found]
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [
            Completion(text, s.ids, s.logprob, s.ids[-1] in self._stop_ids)
            for text, s in zip(texts, found, strict=True)
        ]


def end_markers(tokenizer: Any, stop_ids: Iterable[int]) -> frozenset[int]:
    """The stop tokens that are no text: added tokens, whether or not the tokenizer calls them special.

    Args:
      tokenizer: of transformers.
      stop_ids: the tokens that end a completion; a word or a full stop may be among them.
    """
    added = getattr(tokenizer, "added_tokens_decoder", ())
    return frozenset(i for i in stop_ids if i in added)


def without_marker(ids: Sequence[int], markers: Container[int]) -> Sequence[int]:
    """A completion without the marker at its end.

    >>> without_marker([5, 6, 2], {2}), without_marker([5, 6], {2})
    ([5, 6], [5, 6])
    """
    return ids[:-1] if len(ids) and ids[-1] in markers else ids


def continuation(tokenizer: Any, prompt: Sequence[int] | np.ndarray, ids: Sequence[int]) -> str:
    """The text that `ids` add to a prompt, so that prompt + text is the whole text.

    Decoding the new ids alone would lose a leading space where the tokenizer puts spaces before words.

    Args:
      tokenizer: of transformers.
      prompt: token ids.
      ids: of the completion.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(ids), skip_special_tokens=True)


def settled_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion that is still being decoded, up to where further tokens cannot change it.

    Left out at the end are characters of which bytes are missing, and the last word where it is so short that a
    tokenizer may yet join it to the one before it (`clean_up_tokenization_spaces` writes " n't" as "n't").

    Args:
      tokenizer: of transformers.
      ids: of the completion so far.
    """
    end = len(ids)
    while end and re.fullmatch("<0x..>", tokenizer.convert_ids_to_tokens(int(ids[end - 1])) or ""):
        end -= 1  # bytes are decoded together: a half character after them makes all of them U+FFFD
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True).rstrip("\ufffd")
    last = text.rfind(" ", max(0, len(text) - _JOINED))
    return text[:last] if last >= 0 else text
