"""The forms of records: the completions of each, and which other forms it can be made of.

An objective says which forms it reads (`registry.Reads`); nothing in this folder knows more of it.  A new form is a row
of `FORMS`, and rows of `column_sets.COLUMN_SETS` for the columns that make it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxalign.registry import Reads


class Form(NamedTuple):
    """One form of record."""

    described: str  # for messages
    completions: tuple[str, ...]  # fields after the prompt, in the order of a batch's slots; none: a prompt alone
    example: str  # a line of a file
    made_of: tuple[str, ...] = ()  # forms that contain this one: a pair contains a completion and a prompt


FORMS: dict[str, Form] = {
    "text": Form("plain text", ("text",), '{"text": "..."}'),
    "messages": Form("dialogues", ("messages",), '{"messages": [{"role": "user", "content": "..."}, ...]}'),
    "completion": Form(
        "prompts with one completion each",
        ("completion",),
        '{"prompt": "...", "completion": "..."}',
        made_of=("pair",),
    ),
    "pair": Form(
        "pairs",
        ("chosen", "rejected"),
        '{"prompt": "...", "chosen": "a better answer", "rejected": "a worse one"}',
    ),
    "prompt": Form(
        "prompts only",
        (),
        '{"prompt": "..."}',
        made_of=("text", "messages", "completion", "pair"),
    ),
}


def serves(form: str, reads: Reads | None) -> bool:
    """Whether records of a form can be used where others are read; None is any.

    >>> from jaxalign.registry import COMPLETIONS, PAIRS
    >>> serves("pair", COMPLETIONS), serves("prompt", PAIRS)
    (True, False)
    """
    return reads is None or any(form == wanted or form in FORMS[wanted].made_of for wanted in reads.forms)


def slots(reads: Reads) -> tuple[str, ...]:
    """The names of a record's completions in the order of a batch's slots: the same for all forms that one objective
    reads, whether its one completion is a text, a dialogue or an answer.

    >>> from jaxalign.registry import COMPLETIONS, PAIRS, PROMPTS
    >>> slots(COMPLETIONS), slots(PAIRS), slots(PROMPTS)
    (('completion',), ('chosen', 'rejected'), ())
    """
    return FORMS[reads.forms[0]].completions
