"""Log-probabilities of given completions under a model."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from jaxalign.pipeline.lines import read_lines


def logprobs(
    model: str, data: str, *, separate: bool = False, dtype: str | None = None, out: TextIO | None = None
) -> None:
    """Prints {"sum_logprob", "num_tokens"} for each line of a file, in order.

    Prompt and completion are tokenised as one text, as in training; an end-of-sequence token counts only where the
    completion holds it.

    Args:
      model: directory or hub id of a language model.
      data: a file of lines with strings `prompt` and `completion`.
      separate: tokenise the two apart.
      dtype: of weights and computation; None: the configuration's default.
      out: default: standard output.

    Raises:
      InputError: a model or a line that cannot be used.
    """
    lines = read_lines(data)  # before the model is loaded: a bad file fails at once
    from jaxalign.evaluate.sequences import completion_logprobs
    from jaxalign.pipeline.loaded import load_model, tokenize, warn_of_context

    loaded = load_model(model, head="lm", dtype=dtype, flag="--model")
    places = [line.where for line in lines]
    sequences = tokenize(
        loaded.tokenizer, [(line.prompt, line.completion) for line in lines], places, separate=separate
    )
    warn_of_context(loaded.path, loaded.context, [len(s.prompt) + len(s.completion) for s in sequences], places)
    sums = completion_logprobs(loaded.model, loaded.params, sequences, loaded.mesh)
    for total, tokens in zip(sums, sequences, strict=True):
        print(json.dumps({"sum_logprob": total, "num_tokens": len(tokens.completion)}), file=out or sys.stdout)
