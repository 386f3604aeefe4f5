"""Held-out records for evaluation: prompts to sample from, and reference answers for perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.data.forms import FORMS
from jaxalign.data.records import Content, Record
from jaxalign.data.tokenize import Dropped, Encoder, tokenize_records
from jaxalign.evaluate.sequences import Tokens


class Question(NamedTuple):
    """A held-out prompt."""

    record: Record
    prompt: Content  # a string, or messages that end where the assistant speaks next


def questions(records: Sequence[Record]) -> list[Question]:
    """The prompts of records, in order; plain texts have none.

    The prompt of a dialogue ends before its last assistant turn.

    >>> [q.prompt for q in questions([Record(0, "", 1, "completion", prompt="Q", completion="A")])]
    ['Q']
    """
    found = []
    for record in records:
        prompt = _prompt(record)
        if prompt:
            found.append(Question(record, prompt))
    return found


def _prompt(record: Record) -> Content | None:
    if record.form == "text":
        return None
    if record.form == "messages":
        messages = record.messages or []
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        return messages[:last]
    prompt = record.prompt
    if isinstance(prompt, list):  # chosen and rejected may differ from a user turn on, after an assistant turn
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    return prompt


def references(records: Sequence[Record], tokenizer: Any, stop_ids: Sequence[int], plain: Any) -> list[Tokens]:
    """Reference answers as tokens: completions, chosen sides, assistant turns, whole texts.

    Tokenised as in training, an EOS at the end included; records without an answer are left out.

    Args:
      records: of any form.
      tokenizer: of transformers.
      stop_ids: the tokens that end a completion.
      plain: renderer of messages where the tokenizer has no chat template.
    """
    encoder = Encoder(tokenizer, stop_ids, plain)
    found: list[Tokens] = []
    answered = [record for record in records if FORMS[record.form].completions]
    for example in tokenize_records(answered, encoder, append_eos=encoder.eos_id is not None):
        if not isinstance(example, Dropped):
            found.append(Tokens(example.prompt.tolist(), example.completions[0].tolist(), example.masks[0].tolist()))
    return found
