"""One completion of one prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxalign.errors import InputError

if TYPE_CHECKING:
    from jaxalign.rollout.sampling import Sampling


def generate(
    model: str,
    prompt: str,
    sampling: Sampling,
    *,
    seed: int,
    within_room: bool = False,
    chat: bool = False,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Continues a prompt.

    Args:
      model: directory or hub id of a language model.
      prompt: text as it stands; with `chat`, a user's message.
      sampling: how, and how many tokens at most.
      seed: of the sample.
      within_room: no more tokens than the model has room for behind the prompt.
      chat: render the prompt by the model's chat template, or plainly, as training does, where it has none.
      dtype: of weights and computation; None: the configuration's default.
      chat_template_kwargs: values of names that the chat template reads.

    Returns:
      The completion, without special tokens; prompt + completion is the whole text.

    Raises:
      InputError: a model or a prompt that cannot be used.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 come as halves of pairs
        raise InputError(
            f"--prompt {prompt!r} is not UTF-8", "whole characters", "--prompt 'Once upon a time'"
        ) from error
    from jaxalign.pipeline.loaded import load_model

    loaded = load_model(model, head="lm", dtype=dtype, flag="--model", chat_template_kwargs=chat_template_kwargs)
    if chat and not loaded.tokenizer.chat_template:
        print(f"note: {model} has no chat template: the prompt is written as plain text", file=sys.stderr)

    asked = [{"role": "user", "content": prompt}] if chat else prompt
    generator = loaded.generator(sampling)
    start = loaded.tokenizer(prompt, verbose=False)["input_ids"] if not chat else generator.encode([asked])[0]
    if loaded.context is not None and len(start) + sampling.max_new_tokens > loaded.context:
        room = loaded.context - len(start)
        if within_room and room > 0:
            generator = loaded.generator(sampling._replace(max_new_tokens=room))
        else:
            _warn(model, len(start), None if within_room else sampling.max_new_tokens, loaded.context)
    if not prompt and len(start) and not chat:  # nothing but what the tokenizer puts before a text
        return generator.continue_ids([start], seed=seed)[0].text
    return generator([asked], seed=seed)[0].text


def _warn(model: str, prompt: int, asked: int | None, context: int) -> None:
    """Says on standard error that the text may grow longer than what the model was made for."""
    given = f"the prompt's {prompt} tokens" + ("" if asked is None else f" and --max_new_tokens {asked}")
    advice = f"; --max_new_tokens {context - prompt} stays within" if prompt < context else ""
    print(f"warning: {given}: longer than the {context} tokens that {model} was made for{advice}", file=sys.stderr)
