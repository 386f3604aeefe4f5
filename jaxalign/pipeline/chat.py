"""A dialogue with a model, line by line, its answers as they are decoded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from jaxalign.errors import InputError

if TYPE_CHECKING:
    from jaxalign.rollout.sampling import Sampling

_COLUMNS = 256  # that the dialogue is given, then twice as many: each further number compiles anew

HELP = "/reset begins anew, Ctrl-C stops an answer, /quit (or the end of the input) ends"


def chat(
    model: str,
    sampling: Sampling,
    *,
    seed: int,
    within_room: bool = False,
    system: str | None = None,
    dtype: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> None:
    """Answers each line of the input as the user's next message; the whole dialogue is what the model reads.

    Where the dialogue outgrows the model, its oldest turns are left out.  A Ctrl-C stops an answer: what was said of it
    stays in the dialogue.

    Args:
      model: directory or hub id of a language model, such as a run's export.
      sampling: how, and how many tokens of an answer at most.
      seed: of the first answer; each further one has the next.
      within_room: answers take half of what the model was made for, at most.
      system: a system message before the dialogue.
      dtype: of weights and computation; None: the configuration's default.
      chat_template_kwargs: values of names that the chat template reads.
      lines: the user's messages; None: standard input, with a prompt on a terminal.
      out: where answers go; None: standard output.

    Raises:
      InputError: a model that cannot be used, a message that is longer than the model.
    """
    from jaxalign.pipeline.loaded import load_model

    loaded = load_model(model, head="lm", dtype=dtype, flag="--model", chat_template_kwargs=chat_template_kwargs)
    if not loaded.tokenizer.chat_template:
        print(f"note: {model} has no chat template: the dialogue is written as plain text", file=sys.stderr)
    most = sampling.max_new_tokens
    if loaded.context is not None and within_room:
        most = min(most, max(1, loaded.context // 2))
    generator = loaded.generator(sampling._replace(max_new_tokens=most), columns=_COLUMNS)
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
            turns, ids = _within(generator, start, turns, loaded.context, most)
            answer = _Answer(loaded.tokenizer, loaded.stop_ids, out or sys.stdout)
            try:
                (whole,) = generator.continue_ids([ids], seed=seed, on_tokens=answer.add)
                answer.say(whole.text)
            except KeyboardInterrupt:
                if lines is None and not sys.stdin.isatty():  # a script's: no one is there to type the next message
                    raise
            answer.end()
            seed += 1
            if answer.text:
                turns.append({"role": "assistant", "content": answer.text})
            else:
                turns.pop()  # no word came to this message


class _Answer:
    """An answer that is written while it is decoded."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int], out: TextIO):
        from jaxalign.rollout.engine import end_markers

        self.text = ""  # what has been written
        self._tokenizer, self._out = tokenizer, out
        self._ids: list[int] = []
        self._markers = end_markers(tokenizer, stop_ids)

    def add(self, number: int, ids: Iterable[int]) -> None:
        """Further tokens."""
        from jaxalign.rollout.engine import settled_text

        self._ids.extend(i for i in ids if i not in self._markers)
        self.say(settled_text(self._tokenizer, self._ids))

    def say(self, text: str) -> None:
        """The answer so far: what is new of it is written."""
        text = text.strip()
        if text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._out.write(new)
            self._out.flush()

    def end(self) -> None:
        self._out.write("\n")
        self._out.flush()


def _within(
    generator: Any, start: list[dict[str, str]], turns: list[dict[str, str]], context: int | None, most: int
) -> tuple[list[dict[str, str]], Any]:
    """The dialogue, and its token ids, without the oldest turns where it and an answer outgrow the model."""
    dropped = False
    while len(ids := generator.encode([start + turns])[0]) + most > (context or sys.maxsize):
        if len(turns) == 1:
            raise InputError(
                f"a message of {len(ids)} tokens, and answers of up to {most}",
                f"at most {context} tokens together, what the model was made for",
                "a shorter message, or a smaller --max_new_tokens",
            )
        turns, dropped = turns[2:], True
    if dropped:
        print("note: the oldest turns are left out: the dialogue outgrew the model", file=sys.stderr)
    return turns, ids


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
