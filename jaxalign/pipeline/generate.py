"""One completion of one prompt."""

from __future__ import annotations

import sys

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.ranges import check_flags


def generate(
    model: str,
    prompt: str,
    *,
    temperature: float,
    max_new_tokens: int | None,
    top_k: int,
    top_p: float,
    seed: int,
    chat: bool = False,
    dtype: str | None = None,
) -> str:
    """Continues a prompt.

    Args:
      model: directory or hub id of a language model.
      prompt: text as it stands; with `chat`, a user's message.
      temperature: 0 for the likeliest token always.
      max_new_tokens: most tokens of the completion, its stop token included; None: the configuration's default, or
        what the model has room for behind the prompt where that is less.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      seed: of the sample.
      chat: render the prompt by the model's chat template, or plainly, as training does, where it has none.
      dtype: of weights and computation; None: the configuration's default.

    Returns:
      The completion, without special tokens; prompt + completion is the whole text.

    Raises:
      InputError: a model that cannot be used, a value out of its range.
    """
    most = defaults("ppo").rollout.max_new_tokens if max_new_tokens is None else max_new_tokens
    check_flags(temperature=temperature, max_new_tokens=most, top_k=top_k, top_p=top_p, seed=seed)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 come as halves of pairs
        raise InputError(
            f"--prompt {prompt!r} is not UTF-8", "whole characters", "--prompt 'Once upon a time'"
        ) from error
    from jaxalign.pipeline.loaded import load_model

    loaded = load_model(model, head="lm", dtype=dtype, flag="--model")
    if chat and not loaded.tokenizer.chat_template:
        print(f"note: {model} has no chat template: the prompt is written as plain text", file=sys.stderr)

    def generator(limit: int):
        return loaded.generator(max_new_tokens=limit, temperature=temperature, top_k=top_k, top_p=top_p)

    asked = [{"role": "user", "content": prompt}] if chat else prompt
    start = loaded.tokenizer(prompt, verbose=False)["input_ids"] if not chat else generator(most).encode([asked])[0]
    if loaded.context is not None and len(start) + most > loaded.context:
        room = loaded.context - len(start)
        if max_new_tokens is None and room > 0:
            most = room
        else:
            _warn(model, len(start), max_new_tokens, loaded.context)
    if not prompt and len(start) and not chat:  # nothing but what the tokenizer puts before a text
        return generator(most).continue_ids([start], seed=seed)[0].text
    return generator(most)([asked], seed=seed)[0].text


def _warn(model: str, prompt: int, asked: int | None, context: int) -> None:
    """Says on standard error that the text may grow longer than what the model was made for."""
    given = f"the prompt's {prompt} tokens" + ("" if asked is None else f" and --max_new_tokens {asked}")
    advice = f"; --max_new_tokens {context - prompt} stays within" if prompt < context else ""
    print(f"warning: {given}: longer than the {context} tokens that {model} was made for{advice}", file=sys.stderr)
