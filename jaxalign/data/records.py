"""The record of training data, the input of tokenisation, and counts of what was read, dropped and skipped.

    file, hub id --sources.read--> raw dict --columns, presets--> Record --mixture.load_records--> Records

The entry point is `mixture.load_records(sources, reads, seed=..., max_records=...)`.  Tokenisation relies on:

- `record.index` is the record's position in the result.  A source of weight 2 gives each record twice, with two
  indices and the same `origin`; a held-out split must keep equal origins on one side.
- A field is a string or a list of messages `{"role", "content", ...}`, the same for all fields of a record.
  Strings are used as they are, without a chat template; roles are system, user, assistant and tool.  A message may
  carry what a chat template reads beside role and content (`tool_calls`, `name`, ...); an assistant message with
  `"weight": 0` is not trained on.
- A prompt of messages ends with a user (or tool) turn and its completions begin with an assistant turn, but for
  pairs of dialogues: there the prompt is all that the sides share, turn by turn, and where they part in a user turn
  their completions begin with it.  Nothing in a prompt is scored, and only assistant turns of a completion are.
- A tokenizer without a chat template writes messages as text by `dialogues.render_plain`.

Nothing heavy is imported here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxalign.errors import InputError

Message = dict[str, Any]
Content = str | list[Message]


class Record(NamedTuple):
    """One record; the fields that its form does not have are None.

    | form | fields |
    |---|---|
    | text | text |
    | messages | messages |
    | completion | prompt, completion |
    | pair | prompt, chosen, rejected |
    | prompt | prompt |
    """

    index: int  # type: ignore[assignment]  # hides tuple.index.  Position among the records
    source: str  # file, or hub id and split
    line: int  # line of the file, or record of the set, from 1
    form: str  # one of forms.FORMS
    text: str | None = None
    messages: list[Message] | None = None
    prompt: Content | None = None
    completion: Content | None = None
    chosen: Content | None = None
    rejected: Content | None = None
    weight: float = 1.0  # in the loss
    score: float = 0.0  # a number from the data: margin of a pair, label, rating
    columns: dict[str, Any] = {}  # noqa: RUF012  all other columns, under the data's names; passed to reward functions

    @property
    def origin(self) -> tuple[str, int]:
        """File and line; equal for repeated records and for pairs of one dialogue tree."""
        return self.source, self.line


class BadRow(InputError):
    """One bad row among others; `data.on_error` decides whether it ends the run.

    Args:
      where: file:line.
      problem: what is wrong.
      expected: what was expected.
      fix: how to repair it.
      reason: under which it is counted if it is skipped.
    """

    def __init__(self, where: str, problem: str, expected: str, fix: str, reason: str):
        super().__init__(problem, expected, fix, (where,))
        self.where, self.reason = where, reason


@dataclass
class Tally:
    """What was read, kept, dropped and skipped, and why."""

    on_error: str = "stop"  # or "skip": bad rows are counted and left out
    config_field: str = ""  # that holds the source; "" without a configuration

    read: int = 0  # rows that were read
    kept: int = 0  # usable records, before weights and max_records
    used: int = 0  # records after weights and max_records
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> records
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> bad rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first places, as file:line
    warnings: list[str] = field(default_factory=list)  # about how the sources are read
    sources: list[dict[str, Any]] = field(default_factory=list)  # of each: path, weight, read, kept, dropped, used

    def drop(self, reason: str, where: str) -> None:
        """Counts one record that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._place(reason, where)

    def bad(self, error: BadRow) -> None:
        """Raises the error of a bad row, or counts the row as skipped."""
        if self.on_error != "skip":
            way_on = ", or --config.data.on_error=skip" if self.config_field else ""
            raise InputError(error.problem, error.expected, error.fix + way_on, error.places) from error
        self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        self._place(error.reason, error.where)

    def _place(self, reason: str, where: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < 3:
            places.append(where)

    def absorb(self, other: Tally) -> None:
        """Adds the counts of another tally."""
        self.read += other.read
        self.kept += other.kept
        self.warnings += other.warnings
        for counts, others in ((self.dropped, other.dropped), (self.skipped, other.skipped)):
            for reason, count in others.items():
                counts[reason] = counts.get(reason, 0) + count
        for reason, places in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + places)[:3]

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the data report."""
        return {
            "read": self.read,
            "kept": self.kept,
            "used": self.used,
            "dropped": dict(self.dropped),
            "skipped": dict(self.skipped),
            "examples": {reason: list(places) for reason, places in self.examples.items()},
            "sources": [dict(source) for source in self.sources],
            "warnings": list(self.warnings),
        }


class Notes(Counter[str]):
    """Counts of what happened to records, with up to three places of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, list[str]] = {}

    def add(self, name: str, record: Record, within: str = "") -> None:
        """Counts a record under a name; `within` says where in it."""
        self[name] += 1
        places = self.places.setdefault(name, [])
        if len(places) < 3:
            places.append(f"{record.source}:{record.line}{within}")


def check_skipped(skipped: dict[str, int], read: int, most: float, where: str, places: dict[str, list[str]]) -> None:
    """Raises if the share of bad rows exceeds `data.max_skipped`.

    Args:
      skipped: reason -> rows.
      read: rows, skipped ones included.
      most: the share of rows that may be skipped, `data.max_skipped`.
      where: the source.
      places: reason -> the first places.

    Raises:
      InputError: with the reasons, their counts and where each came first.
    """
    count = sum(skipped.values())
    if count <= most * read:
        return
    ranked = sorted(skipped.items(), key=lambda item: -item[1])
    said = "; ".join(f"{n} {reason} (first at {places[reason][0]})" for reason, n in ranked[:6])
    raise InputError(
        f"{where}: {count} of {read} rows are wrong: {said}",
        f"at most {most:.2%} of the rows (data.max_skipped)",
        f"repair or delete them, or --config.data.max_skipped={-(-1000 * count // read) / 1000:g}",
    )
