"""Rows to records: decides which columns mean what, and converts."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxalign.data.column_sets import (
    COLUMN_SETS,
    PROMPT_FIELDS,
    ColumnSet,
    SkipRow,
    blank,
    blank_prompt,
    narrowed,
    number,
    truth,
)
from jaxalign.data.dialogues import is_dialogue, until_request
from jaxalign.data.files import Raw
from jaxalign.data.forms import serves
from jaxalign.data.preference import Codes, codes_of, column_name
from jaxalign.data.records import BadRow, Record
from jaxalign.data.source import Source, config_line
from jaxalign.data.unmapped import (
    columns_of,
    guessed_columns,
    nearest,
    no_form,
    only_text,
    unlabelled,
    wrong_form,
)
from jaxalign.errors import InputError
from jaxalign.registry import Reads

# Our names of columns, the keys of a source's `columns`.
FIELDS: dict[str, str] = {
    "text": "a text to continue or to train on whole",
    "messages": "a list of messages; with chosen and rejected, the prompt",
    "prompt": "a string used as it is, or a list of messages",
    "completion": "what follows the prompt",
    "chosen": "the better completion, or the better whole dialogue",
    "rejected": "the worse completion, or the worse whole dialogue",
    "instruction": "the user's turn (Alpaca)",
    "input": "what the instruction is about (Alpaca)",
    "output": "the assistant's turn (Alpaca)",
    "system": "the system message (ShareGPT, Alpaca)",
    "history": "earlier turns, as pairs of strings (Alpaca)",
    "preference": "which side is better: a column of 1 and 2, or a dict of it and its codes (see preference.py)",
    "score": "a number for the loss: margin of a pair, label, rating",
    "weight": "weight of the record in the loss",
}

# Other names for our fields that need no mapping.  A column `preference` or `weight` may mean anything: map it.
_ALIASES: tuple[tuple[str, str], ...] = (("conversations", "messages"), ("margin", "score"))
_ONLY_MAPPED = ("preference", "weight", "score")


class ColumnPlan(NamedTuple):
    """How the rows of one file become records."""

    source: Source
    columns: ColumnSet
    names: dict[str, str]  # our name -> the data's
    labelled: bool  # whether `label` is true or false for each completion: unpaired feedback, as for KTO
    codes: Codes | None = None  # of the column that says which side is better
    warnings: tuple[str, ...] = ()  # about what may be wrong

    @property
    def form(self) -> str:
        """The form of the records."""
        return self.columns.form


def make_plan(source: Source, sample: list[Raw], reads: Reads | None) -> ColumnPlan:
    """Decides which columns mean what.

    Mapped names come first, then our names and their aliases as the data has them.  Of the sets of columns
    that are there, the one that uses most mapped columns is taken, then one of a form that is read, then the first of
    `COLUMN_SETS`.

    Args:
      source: with its mapping.
      sample: the first rows of a file.
      reads: what the records are for, or None for any.

    Raises:
      InputError: where the columns make no record, or one of a form that is not read; naming the columns there
        are and the config line that maps them.
    """
    file, present = sample[0].file, columns_of(raw.row for raw in sample)
    listed = list(dict.fromkeys(name for raw in sample for name in raw.row))
    names = _mapped(source, file, listed)
    taken = set(names.values())
    for theirs, ours in (*((name, name) for name in FIELDS if name not in _ONLY_MAPPED), *_ALIASES):
        if ours not in names and theirs in present and theirs not in taken:
            names[ours] = theirs
    if "score" not in source.columns and "score" in names and not _numeric(sample, names["score"]):
        del names["score"]
    codes = codes_of(source.columns["preference"]) if "preference" in source.columns else None
    possible = [
        columns
        for columns in COLUMN_SETS
        if all(ours in names and (names[ours] in present or ours in source.columns) for ours in columns.required)
    ]
    if not possible:
        raise no_form(source, sample, listed, reads)

    def rank(columns: ColumnSet) -> tuple[int, bool]:
        return sum(ours in columns.required + columns.optional for ours in source.columns), serves(columns.form, reads)

    columns = max(possible, key=rank)
    for ours in source.columns:
        if ours not in columns.required + columns.optional + ("score", "weight"):
            rest = {k: v for k, v in source.columns.items() if k != ours}
            raise InputError(
                f"{file}: columns maps {ours!r}, which {_plural(columns)} do not use",
                f"{', '.join(columns.required)} and, where there, {', '.join(columns.optional + ('score', 'weight'))}",
                config_line(source, columns=rest),
            )
    labels = [raw.row.get("label") for raw in sample if raw.row.get("label") not in (None, "")]
    labelled = columns.form in ("messages", "completion") and bool(labels) and None not in map(truth, labels)
    if not serves(columns.form, reads):
        raise wrong_form(source, sample, columns.form, listed, reads, labelled)
    is_pair = columns.form == "pair"
    columns = narrowed(columns, reads)
    asks = is_pair and codes is None and columns.form != "prompt"  # whether chosen must be told from rejected
    used = {ours: theirs for ours, theirs in names.items() if ours in columns.required + columns.optional}
    used |= {ours: names[ours] for ours in ("score", "weight") if ours in names}
    if columns.form == "pair" and not any(ours in used for ours in _PROMPTS):
        _check_implicit(source, sample, listed, used)
    warnings = [unlabelled(source, sample, names) if asks else ""]
    if "score" in source.columns and reads is not None and not reads.score:
        warnings.append(f"{file}: columns maps 'score' without effect: only algorithm.use_margin of reward reads it")
    return ColumnPlan(source, columns, used, labelled, codes, tuple(filter(None, warnings)))


def widened(plan: ColumnPlan, sample: list[Raw], raw: Raw, reads: Reads | None) -> ColumnPlan:
    """The plan from a row on that has columns which the first rows lack, where the form can use them.

    Args:
      plan: made from `sample`.
      sample: the first rows of the file.
      raw: the row.
      reads: as `make_plan` got it.

    Raises:
      InputError: where the column would change how the rows before it had to be read.
    """
    wider = make_plan(plan.source, [*sample, raw], reads)
    if wider.columns.required != plan.columns.required:  # another column set; the current one still fits
        return plan
    names = {**wider.names, **plan.names}
    as_text = any(isinstance(row.row.get(plan.names.get("prompt", "")), str) for row in sample)
    if "system" in names.keys() - plan.names.keys() and as_text:
        raise InputError(
            f"{raw.where}: the first {names['system']!r} of the file, behind prompts that were read as plain text",
            f"{names['system']!r} among the first {len(sample)} records, where it makes every prompt a user's turn",
            "move that record to the top of the file",
        )
    return wider._replace(names=names)


_PROMPTS = ("prompt", "messages", "instruction")


def _check_implicit(source: Source, sample: list[Raw], listed: list[str], names: dict[str, str]) -> None:
    """Refuses pairs of plain strings without a prompt column."""
    sides = [raw.row.get(names[side]) for raw in sample for side in ("chosen", "rejected")]
    if any(side and not (isinstance(side, str) and not is_dialogue(side)) for side in sides):
        return
    rest = [Raw(r.file, r.line, {k: v for k, v in r.row.items() if k not in names.values()}) for r in sample]
    guess = guessed_columns(rest, ("prompt",)) or dict.fromkeys(("prompt",), only_text(rest) or "COLUMN")
    raise InputError(
        f"{sample[0].file}: columns {', '.join(listed)}, none of them a prompt",
        "prompt + chosen + rejected, or whole dialogues (\\n\\nHuman: ... \\n\\nAssistant: ...) in chosen and rejected",
        config_line(source, columns={**source.columns, **guess}),
    )


def _mapped(source: Source, file: str, listed: list[str]) -> dict[str, str]:
    """The source's mapping, checked against the columns that the data has."""
    if turned := _turned(source.columns, listed):
        raise InputError(
            f"{file}: columns {source.columns!r} maps the data's names to ours",
            f"our names first, then those of the data, which are {', '.join(listed)}",
            config_line(source, columns=turned),
        )
    for ours, theirs in source.columns.items():
        if ours not in FIELDS:
            near = nearest(ours, FIELDS)
            rest = {(near if k == ours else k): v for k, v in source.columns.items()}
            raise InputError(
                f"columns maps {ours!r}", f"one of our names: {', '.join(FIELDS)}", config_line(source, columns=rest)
            )
        name = column_name(theirs)
        if name not in listed:
            near = nearest(name, listed)
            right = near if isinstance(theirs, str) else {**theirs, "column": near}
            raise InputError(
                f"{file}: no column {name!r}",
                f"one of its columns: {', '.join(listed)}",
                config_line(source, columns={**source.columns, ours: right}),
            )
    return {ours: column_name(theirs) for ours, theirs in source.columns.items()}


def _turned(columns: dict[str, Any], listed: list[str]) -> dict[str, Any]:
    """A mapping with those entries the other way round that only so fit the data; empty where there are none."""

    def wrong(ours: str, theirs: Any) -> bool:
        return ours in listed and theirs in FIELDS and not (ours in FIELDS and theirs in listed)

    mapped = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, str)}
    if not any(wrong(*entry) for entry in mapped.items()):
        return {}
    right = {ours: theirs for ours, theirs in columns.items() if ours not in mapped or not wrong(ours, theirs)}
    return right | {theirs: ours for ours, theirs in mapped.items() if wrong(ours, theirs)}


def _numeric(sample: list[Raw], name: str) -> bool:
    """Whether a column holds numbers, also as strings of digits, as in csv."""
    values = [raw.row.get(name) for raw in sample]
    if any(isinstance(value, bool) for value in values):
        return False
    try:
        for value in values:
            float(value or 0)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _plural(columns: ColumnSet) -> str:
    return f"records of {', '.join(columns.required)}"


def to_record(plan: ColumnPlan, raw: Raw) -> Record:
    """One row as a record, with index 0 and every unused column in `columns`.

    Raises:
      SkipRow: with the reason, for a row that holds nothing to train on.
      UnknownCode: where the column that says which side is better holds a code of no meaning.
      BadRow: for a row that is wrong, with its file and line.
    """
    row = {}
    for ours, theirs in plan.names.items():
        if theirs not in raw.row and ours in plan.columns.required:
            found = f"no {theirs!r}, only {', '.join(raw.row) or 'nothing'}"
            raise _bad(plan, raw, found, f"a {theirs!r} in every record", f"no {theirs!r}")
        value = raw.row.get(theirs)
        if value is None and ours in plan.columns.required:
            raise SkipRow(f"{ours} is null")
        # For these columns null has a meaning.
        if value is not None or ours in ("system", "preference") or (ours == "prompt" and theirs in raw.row):
            row[ours] = value
    if "preference" in row and plan.codes is not None:
        row["preference"] = plan.codes.winner(row["preference"])
    try:
        score, weight = number(row, "score", 0.0), number(row, "weight", 1.0)
        if weight < 0:
            raise ValueError(f"weight is {weight:g}, less than 0")
        fields = plan.columns.make(row)
    except ValueError as error:
        raise _bad(plan, raw, str(error), " + ".join(plan.columns.required)) from error
    for value in fields.values():
        _check_text(value)
    rest = {name: value for name, value in raw.row.items() if name not in plan.names.values()}
    return Record(0, raw.file, raw.line, plan.form, weight=weight, score=score, columns=rest, **fields)


def _bad(plan: ColumnPlan, raw: Raw, problem: str, expected: str, reason: str = "") -> BadRow:
    names = plan.names if plan.names != dict(zip(plan.names, plan.names)) else {}
    fix = "repair or delete that record"
    if names:  # the mapping may be wrong
        fix += f", or {config_line(plan.source, columns={**names, **plan.source.columns})}"
    return BadRow(raw.where, problem, expected, fix, reason or _reason(problem))


def _reason(problem: str) -> str:
    """A problem without the row's own values, so that equal problems are counted together.

    >>> _reason("message 12 has the role 'wizard'; known are bot, user")
    'message ... has the role ...'
    """
    masked = re.sub(r"'[^']*'|\"[^\"]*\"|-?\d+(\.\d+)?([eE][+-]?\d+)?", "...", problem)
    return re.split(r"[;(\[]|, ", masked, maxsplit=1)[0].strip()[:80]


def _check_text(value: Any) -> None:
    """Skips text with half a surrogate pair, such as a cut emoji: a tokenizer cannot encode it."""
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise SkipRow("broken unicode (half a surrogate pair)") from None


def fit(record: Record, reads: Reads | None, raw: Raw, plan: ColumnPlan) -> Record:
    """A record as an objective reads it.

    Where completions are read, those that are labelled false are left out.  Where prompts are, every record becomes
    one: a dialogue is cut before its last answer, a text is a prompt as a whole, and every column but the prompt's goes
    to reward functions: `completion`, `answer`, whatever the data calls it.

    Raises:
      SkipRow: with the reason, for a record that holds nothing to read.
    """
    if reads is None:
        return record
    if "prompt" not in reads.forms:
        if plan.labelled and truth(raw.row.get("label")) is False:
            raise SkipRow("labelled false")
        if record.form == "messages" and blank(record.messages or []):
            raise SkipRow("no assistant turn")
        return record
    prompt = record.prompt or record.messages or record.text or ""
    if isinstance(prompt, list):
        prompt = until_request(prompt)
    if blank_prompt(prompt):
        raise SkipRow("no user turn")
    own = {plan.names[ours] for ours in (*PROMPT_FIELDS, "text") if ours in plan.names}
    columns = {name: value for name, value in raw.row.items() if name not in own}
    return record._replace(form="prompt", prompt=prompt, text=None, messages=None, columns=columns)
