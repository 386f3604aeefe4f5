"""One completion of one prompt."""

from __future__ import annotations

from jaxalign.errors import InputError


def generate(
    model: str,
    prompt: str,
    *,
    temperature: float,
    max_new_tokens: int,
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
      max_new_tokens: most tokens of the completion, its stop token included.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      seed: of the sample.
      chat: render the prompt by the model's chat template.
      dtype: of weights and computation; None: the configuration's default.

    Returns:
      The completion, without special tokens; prompt + completion is the whole text.

    Raises:
      InputError: a model that cannot be used, a value out of its range, a model without a chat template.
    """
    check_sampling(temperature, max_new_tokens, top_k, top_p)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 come as halves of pairs
        raise InputError(
            f"--prompt {prompt!r} is not UTF-8", "whole characters", "--prompt 'Once upon a time'"
        ) from error
    from jaxalign.pipeline.loaded import load_model, warn_of_context
    from jaxalign.rollout.engine import Generator

    loaded = load_model(model, head="lm", dtype=dtype)
    if chat and not loaded.tokenizer.chat_template:
        raise InputError(f"{model} has no chat template", "a chat model", "jaxalign generate without --chat")
    generator = Generator(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        stop_ids=loaded.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        mesh=loaded.mesh,
    )
    start = loaded.tokenizer(prompt, verbose=False)["input_ids"]
    warn_of_context(loaded, [len(start) + max_new_tokens], ["prompt and completion"])
    if not prompt and start and not chat:  # nothing but what the tokenizer puts before a text
        return generator.continue_ids([start], seed=seed)[0].text
    message = [{"role": "user", "content": prompt}]
    return generator([message if chat else prompt], seed=seed)[0].text


def check_sampling(temperature: float, max_new_tokens: int, top_k: int, top_p: float) -> None:
    """Refuses values that mean nothing.

    Raises:
      InputError: naming the flag.
    """
    for flag, value, good, expected in (
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1 (off)"),
    ):
        if not good:
            raise InputError(f"--{flag} {value}", expected, f"--{flag} 1")
