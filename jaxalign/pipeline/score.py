"""Scores of given completions: a reward model's, or DPO's implicit reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any, TextIO

from jaxalign.errors import InputError
from jaxalign.pipeline.lines import read_lines
from jaxalign.ranges import check_flags


def score(
    model: str,
    data: str,
    *,
    ref: str | None = None,
    beta: float | None = None,
    append_eos: bool = False,
    separate: bool = False,
    dtype: str | None = None,
    out: TextIO | None = None,
) -> None:
    """Prints {"score"} for each line of a file, in order.

    Without a reference, `model` is a reward model and its score is read at the last token of prompt and completion.
    With one, `model` is a policy and the score is DPO's implicit reward,

        beta (log p_model(completion | prompt) - log p_ref(completion | prompt))

    (Rafailov et al. 2023, arXiv 2305.18290, equation 5 without the prompt's constant).

    Args:
      model: directory or hub id.
      data: a file of lines with strings `prompt` and `completion`.
      ref: the reference policy, a directory or hub id.
      beta: of the DPO run; needed with `ref`.
      append_eos: end each completion that has no end by the tokenizer's EOS, as a finished answer; default: as it
        stands.
      separate: tokenise prompt and completion apart; default: as one text, as in training.
      dtype: of weights and computation; None: the configuration's default.
      out: default: standard output.

    Raises:
      InputError: a model, a line or a combination of arguments that cannot be used.
    """
    if (ref is None) != (beta is None):
        raise InputError(
            "--ref without --beta" if beta is None else "--beta without --ref",
            "both, for DPO's implicit reward, or neither, for a reward model",
            f"jaxalign score --model {model} --data {data} --ref {ref or 'DIR'} --beta {beta or 0.1}",
        )
    check_flags(beta=beta)
    lines = read_lines(data)
    from jaxalign.evaluate.sequences import Tokens, completion_logprobs, final_scores
    from jaxalign.models.tokenizer import stop_ids
    from jaxalign.pipeline.loaded import check_weights, load_model, require_head, tokenize, warn_of_context
    from jaxalign.rewards.model import require_finite

    places = [line.where for line in lines]

    def read(path: str, tokenizer: Any) -> list[Tokens]:
        pairs = [(line.prompt, line.completion) for line in lines]
        sequences = tokenize(tokenizer, pairs, places, separate=separate)
        ends = stop_ids(path, tokenizer)
        if ref is None:
            sequences = [Tokens(s.prompt, up_to_end(s.completion, ends, tokenizer)) for s in sequences]
        if not append_eos:
            return sequences
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {path} has no EOS", "one, for --append_eos", "no --append_eos")
        return [
            s if set(s.completion[-1:]) & set(ends) else Tokens(s.prompt, [*s.completion, tokenizer.eos_token_id])
            for s in sequences
        ]

    paths = {"--model": model} if ref is None else {"--model": model, "--ref": ref}
    head = "score" if ref is None else "lm"
    tokenizers = {flag: require_head(path, head, flag)[1] for flag, path in paths.items()}
    sequences = read(model, tokenizers["--model"])
    if ref is not None and (other := read(ref, tokenizers["--ref"])) != sequences:
        place = next(p for p, a, b in zip(places, sequences, other, strict=True) if a != b)
        raise InputError(
            f"{place}: the tokenizers of {model} and {ref} give different tokens",
            "a reference with the policy's tokenizer",
            "--ref=the model that the policy started from",
        )
    if ref not in (None, model):
        check_weights(ref, head=head, dtype=dtype, flag="--ref")  # its turn comes late
    measure = final_scores if ref is None else completion_logprobs
    numbers = []
    for flag, path in paths.items():  # one after the other: one model in memory
        loaded = load_model(path, head=head, dtype=dtype, flag=flag)
        warn_of_context(loaded.path, loaded.context, [len(s.prompt) + len(s.completion) for s in sequences], places)
        numbers.append(measure(loaded.model, loaded.params, sequences, loaded.mesh))
        del loaded
    if beta is None:
        scores = numbers[0]
    else:
        scores = [beta * (policy - reference) for policy, reference in zip(*numbers, strict=True)]
    require_finite(scores, places, model)
    for value in scores:
        print(json.dumps({"score": value}), file=out or sys.stdout)


def up_to_end(completion: Sequence[int], ends: Collection[int], tokenizer: Any) -> list[int]:
    """A completion without the white space that a template writes behind the end of a turn.

    A reward model was trained to be read at that end.

    Args:
      completion: token ids.
      ends: the ids that end a turn.
      tokenizer: to tell white space.
    """
    last = max((i for i, token in enumerate(completion) if token in ends), default=len(completion))
    return list(completion[: last + 1] if not tokenizer.decode(list(completion[last + 1 :])).strip() else completion)
