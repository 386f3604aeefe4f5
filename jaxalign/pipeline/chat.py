"""A dialogue with a model, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from jaxalign.errors import InputError

if TYPE_CHECKING:
    from jaxalign.rollout.sampling import Sampling

HELP = "/reset begins anew, /quit (or the end of the input) ends"


def chat(
    model: str,
    sampling: Sampling,
    *,
    system: str | None = None,
    seed: int,
    within_room: bool = False,
    dtype: str | None = None,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> None:
    """Answers each line of the input as the user's next message; the whole dialogue is what the model reads.

    Where the dialogue outgrows the model, its oldest turns are left out.

    Args:
      model: directory or hub id of a language model, such as a run's export.
      sampling: how, and how many tokens of an answer at most.
      system: a system message before the dialogue.
      seed: of the first answer; each further one has the next.
      within_room: answers take half of what the model was made for, at most.
      dtype: of weights and computation; None: the configuration's default.
      lines: the user's messages; None: standard input, with a prompt on a terminal.
      out: where answers go; None: standard output.

    Raises:
      InputError: a model that cannot be used, a message that is longer than the model.
    """
    from jaxalign.pipeline.loaded import load_model

    loaded = load_model(model, head="lm", dtype=dtype, flag="--model")
    if not loaded.tokenizer.chat_template:
        print(f"note: {model} has no chat template: the dialogue is written as plain text", file=sys.stderr)
    most = sampling.max_new_tokens
    if loaded.context is not None and within_room:
        most = min(most, max(1, loaded.context // 2))
    generator = loaded.generator(sampling._replace(max_new_tokens=most))
    start = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    for line in _typed() if lines is None else lines:
        said = line.strip()
        if said == "/quit":
            break
        if said in ("/reset", "/help"):
            turns = [] if said == "/reset" else turns
            print(HELP if said == "/help" else "a new dialogue", file=sys.stderr)
        elif said:
            turns.append({"role": "user", "content": said})
            turns = _within(generator, start, turns, loaded.context, most)
            (answer,) = generator([start + turns], seed=seed)
            seed += 1
            turns.append({"role": "assistant", "content": answer.text.strip()})
            print(answer.text.strip(), file=out or sys.stdout, flush=True)


def _within(
    generator: Any, start: list[dict[str, str]], turns: list[dict[str, str]], context: int | None, most: int
) -> list[dict[str, str]]:
    """The dialogue without its oldest turns, as far as the model and an answer of `most` tokens have no room for it."""
    dropped = False
    while context is not None and len(ids := generator.encode([start + turns])[0]) + most > context:
        if len(turns) == 1:
            raise InputError(
                f"a message of {len(ids)} tokens, and answers of up to {most}",
                f"at most {context} tokens together, what the model was made for",
                "a shorter message, or a smaller --max_new_tokens",
            )
        turns, dropped = turns[2:], True
    if dropped:
        print("note: the oldest turns are left out: the dialogue outgrew the model", file=sys.stderr)
    return turns


def _typed() -> Iterator[str]:
    """Lines of standard input; on a terminal each behind a prompt, until its end or a Ctrl-C."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
