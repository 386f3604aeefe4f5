"""Errors about columns that make no record of a form that is read, with the mapping that is most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxalign.data.column_sets import COLUMN_SETS
from jaxalign.data.dialogues import as_messages
from jaxalign.data.files import Raw
from jaxalign.data.forms import FORMS, serves, slots
from jaxalign.data.preference import SIDES, Codes, counter, guessed_map, label_columns, shown, twins
from jaxalign.data.source import Source, config_line
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS, Reads

_GUESSES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "problem", "request", "context", "input", "instruction"),
    "completion": ("answer", "response", "output", "target", "solution", "reply", "summary"),
    "chosen": ("chosen_response", "preferred", "winner", "better", "good", "accepted", "positive"),
    "rejected": ("rejected_response", "dispreferred", "loser", "worse", "bad", "negative"),
    "messages": ("dialog", "dialogue", "conversation", "turns", "chat"),
    "text": ("content", "document", "story", "review", "body"),
}


def columns_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the columns with a value in at least one row, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))


_CHECK = "; which code means which answer, the data's description says"


def unlabelled(source: Source, sample: list[Raw], names: dict[str, str]) -> str:
    """Refuses two answers with neutral names beside a column that may be the label; else a warning, or ""."""
    sides = names.get("chosen", ""), names.get("rejected", "")
    if not twins(*sides):
        return ""
    file, labels = sample[0].file, label_columns((raw.row for raw in sample), names.values())
    if not labels:
        return (
            f"{file}: {sides[0]} counts as better than {sides[1]} in every record; if a column says which is better,"
            ' map it: "preference": {"column": ..., "first": ..., "second": ...}'
        )
    column = next(iter(labels))
    held = " and ".join(f"{name!r} holds {shown(codes)}" for name, codes in labels.items())
    mapped = {**source.columns, "preference": guessed_map(column, labels[column], sides)}
    raise InputError(
        f"{file}: {sides[0]!r} as chosen and {sides[1]!r} as rejected in every record, but {held}"
        f" in the first {len(sample)} records",
        "the column that says which answer is better, mapped to preference with the meaning of its codes",
        config_line(source, columns=mapped) + _CHECK,
    )


def unknown_code(
    source: Source, codes: Codes, names: Mapping[str, str], raw: Raw, code: str, counts: Mapping[str, int]
) -> InputError:
    """The error for a code that means neither side nor a tie.

    Args:
      source: with its mapping.
      codes: what is known of them.
      names: our name -> the data's.
      raw: the first row with such a code.
      code: it.
      counts: how often each code occurs in the source.
    """
    known = {side: [c for c, s in codes.sides.items() if s == side] for side in SIDES}
    said = ", ".join(f"{side} {' or '.join(own)}" for side, own in known.items() if own)
    sides = names.get("chosen", ""), names.get("rejected", "")
    guess = guessed_map(codes.column, [c for c in counts if c], sides)
    return InputError(
        f"{raw.where}: {codes.column!r} is {code}, which no code of the preference map means ({said});"
        f" in all the column holds {shown(counts)}",
        "a map in which every code is first, second or tie",
        config_line(source, columns={**source.columns, "preference": guess}) + _CHECK,
    )


def _two_answers(source: Source, sample: list[Raw]) -> tuple[str, str] | None:
    """Found and fix for data with two answers and a label instead of chosen and rejected; else None."""
    texts = [n for n in columns_of(r.row for r in sample) if any(isinstance(r.row.get(n), (str, list)) for r in sample)]
    labels = label_columns((raw.row for raw in sample), source.columns)
    texts = [name for name in texts if name not in labels]
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :] if twins(a, b)]
    # Of several pairs that whose cells are longest: answers, not the names of models.
    size = {pair: sum(len(str(raw.row.get(name) or "")) for raw in sample for name in pair) for pair in pairs}
    if not pairs or not labels:
        return None
    one, two = sides = max(pairs, key=lambda pair: size[pair])
    if counter(one)[1] > counter(two)[1]:
        one, two = sides = two, one
    column = next(iter(labels))
    rest = [Raw(r.file, r.line, {k: v for k, v in r.row.items() if k not in (*sides, *labels)}) for r in sample]
    mapped: dict[str, Any] = {**guessed_columns(rest, ("prompt",)), "chosen": one, "rejected": two}
    mapped["preference"] = guessed_map(column, labels[column], sides)
    held = " and ".join(f"{name!r} ({shown(codes)})" for name, codes in labels.items())
    return f"two answers {one!r} and {two!r}, and {held} to say which is better", (
        config_line(source, columns={**source.columns, **mapped}) + _CHECK
    )


def _dialogues(sample: list[Raw]) -> dict[str, str]:
    """A mapping of messages to the first column that holds lists of them; none where there is none."""
    for name in columns_of(raw.row for raw in sample):
        value = next(raw.row[name] for raw in sample if raw.row.get(name) is not None)
        try:
            if not isinstance(value, str) and as_messages(value):
                return {"messages": name}
        except ValueError:
            continue
    return {}


def only_text(sample: list[Raw]) -> str | None:
    """The only column with text, if there is exactly one."""
    texts = [n for n in columns_of(r.row for r in sample) if any(isinstance(r.row.get(n), str) for r in sample)]
    return texts[0] if len(texts) == 1 else None


def nearest(name: str, names: Iterable[str]) -> str:
    lowered = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)
    return lowered[found[0]] if found else ""


def guessed_columns(sample: list[Raw], wanted: tuple[str, ...]) -> dict[str, str]:
    """A mapping of wanted fields to the columns with text that most likely hold them; none where no name is near."""
    texts = [n for n in columns_of(r.row for r in sample) if any(isinstance(r.row.get(n), (str, list)) for r in sample)]
    guess: dict[str, str] = {}
    for ours in wanted:
        free = {name.lower(): name for name in texts if name not in guess.values()}
        names = [name for name in (ours, *_GUESSES.get(ours, ())) if name in free]
        names += [name for name in free if ours in name.replace("-", "_").split("_")]
        names += difflib.get_close_matches(ours, free, n=1, cutoff=0.7)
        if names:
            guess[ours] = free[names[0]]
    return guess


def _columns_for(reads: Reads | None) -> str:
    return "; ".join(" + ".join(columns.required) for columns in COLUMN_SETS if serves(columns.form, reads))


def _compares(reads: Reads | None) -> bool:
    """Whether the objective compares completions: which is better must come from the data."""
    return reads is not None and len(slots(reads)) > 1


def _mapping_line(source: Source, sample: list[Raw], reads: Reads | None, form: str | None = None) -> str:
    """The config line that maps what the columns most likely are, or what to do where none seems right."""
    wanted = ("prompt", *(("completion",) if reads is None else slots(reads)))
    guess = guessed_columns(sample, wanted)
    sides = FORMS["pair"].completions
    if reads is None and set(sides) <= (pair := guessed_columns(sample, ("prompt", *sides))).keys():
        return config_line(source, columns={**source.columns, **{k: v for k, v in pair.items() if k != v}})
    if not _compares(reads) and not guess:  # one column that holds all?
        guess, text = _dialogues(sample), only_text(sample)
        if not guess and text is not None:
            guess = {wanted[0] if len(wanted) == 1 else "text": text}
        if guess:
            return config_line(source, columns={**source.columns, **guess})
    missing = [ours for ours in wanted if ours not in guess and ours != "prompt"]
    if missing and _compares(reads):
        line = f"{config_line(source, path='PAIRS.jsonl', columns={}, preset=None)} with {' and '.join(missing)} in it"
        others = [f'defaults("{name}")' for name, other in ALGORITHMS.items() if form and serves(form, other.reads)]
        return f"{line}; as it is, the data is for {' or '.join(others)}" if others else line
    guess = {ours: guess.get(ours, "COLUMN") for ours in wanted if ours in guess or not _compares(reads)}
    return config_line(source, columns={**source.columns, **{k: v for k, v in guess.items() if k != v}})


def _nulls(sample: list[Raw], listed: list[str]) -> str:
    """A note on empty columns, for messages."""
    null = [name for name in listed if all(raw.row.get(name) is None for raw in sample)]
    return f"; {', '.join(null)}: null in the first {len(sample)} records" if null else ""


_COMMAS = (
    "import csv; w = csv.writer(open('NEW.csv', 'w')); w.writerows(csv.reader(open({file!r}), delimiter={mark!r}))"
)


def _delimiter(sample: list[Raw], listed: list[str]) -> str:
    """The delimiter inside the only column of a csv's header, if the file was split by another one; else ""."""
    name = max(listed, key=len, default="") if sample[0].file.lower().endswith((".csv", ".tsv")) else ""
    return next((mark for mark in "|;\t^~\x01\x1f" if mark in name.strip(mark)), "")


def no_form(source: Source, sample: list[Raw], listed: list[str], reads: Reads | None) -> InputError:
    file = sample[0].file
    if mark := _delimiter(sample, listed):
        return InputError(
            f"{file}: columns {', '.join(map(repr, listed))}: cells parted by {mark!r}",
            "commas, or a header whose only marks are semicolons, tabs or |",
            f'python -c "{_COMMAS.format(file=file, mark=mark)}"',
        )
    if reads and _compares(reads) and (two := _two_answers(source, sample)):
        found = f"{sample[0].file}: {two[0]} (columns {', '.join(listed)})"
        return InputError(found, f"{_wanted(reads)}: {_columns_for(reads)}", two[1])
    return InputError(
        f"{sample[0].file}: columns {', '.join(listed) or '(none)'}{_nulls(sample, listed)}",
        f"the columns of one form: {_columns_for(reads)}",
        _mapping_line(source, sample, reads),
    )


def _wanted(reads: Reads) -> str:
    return FORMS[reads.forms[0]].described if _compares(reads) else "completions to train on"


def wrong_form(
    source: Source, sample: list[Raw], form: str, listed: list[str], reads: Reads, labelled: bool
) -> InputError:
    found = FORMS[form].described
    if labelled:
        found += ", each labelled true or false (unpaired feedback, the form of KTO)"
    fix = _mapping_line(source, sample, reads, form)
    if _compares(reads) and (two := _two_answers(source, sample)):
        found, fix = f"{found}, with {two[0]}", two[1]
    return InputError(
        f"{sample[0].file}: {found} (columns {', '.join(listed)}{_nulls(sample, listed)})",
        f"{_wanted(reads)}: {_columns_for(reads)}",
        fix,
    )
