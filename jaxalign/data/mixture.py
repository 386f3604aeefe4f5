"""Loads all sources of a run as records and mixes them by weight."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from jaxalign.data.column_sets import SkipRow
from jaxalign.data.columns import ColumnPlan, fit, make_plan, to_record, widened
from jaxalign.data.files import Raw
from jaxalign.data.forms import FORMS
from jaxalign.data.preference import Codes, UnknownCode, canonical
from jaxalign.data.presets import apply_preset
from jaxalign.data.records import BadRow, Record, Tally, check_skipped
from jaxalign.data.source import Source, parse_sources
from jaxalign.data.sources import read
from jaxalign.data.spool import Records, Spool
from jaxalign.data.unmapped import columns_of, unknown_code
from jaxalign.errors import InputError
from jaxalign.registry import Reads

_SAMPLE = 256  # rows of a file that decide what its columns mean


def load_records(
    sources: Any,
    reads: Reads | None,
    *,
    seed: int = 0,
    max_records: int | None = None,
    field: str = "",
    on_error: str = "stop",
    max_skipped: float = 1.0,
    directory: str | os.PathLike | None = None,
) -> tuple[Records, Tally]:
    """Reads, converts and mixes sources.

    A source of n usable records and weight w gives round(w n) records, at least one: each as often as w has whole
    parts, and a share of them, drawn without replacement from the seed, once more for the rest.  Sources are
    interleaved evenly, each in its own order, so that every prefix has the mixture's proportions; the loader shuffles.
    The result is a function of the sources and the seed.

    Args:
      sources: `config.data.sources`: a path, a dict with the fields of `Source`, or a sequence of these.
      reads: the forms that the objective reads, to which other forms are reduced; None keeps records as they are.
      seed: of the draw where weights have fractions.
      max_records: the first so many of the mixture are kept; a single source of weight 1 is read no further.
      field: the config field that holds the sources, for messages; default: none.
      on_error: "stop" at the first bad row, or "skip" bad rows and count them by reason.
      max_skipped: the share of a source's rows that may be skipped.
      directory: for a temporary file of the records; see `Spool`.

    Returns:
      The records, `index` counting from 0, and what was read, dropped and why.

    Raises:
      InputError: a source is missing, cannot be read, lacks columns, has records of other forms only, or has none;
        with the line of the config or of the file.
    """
    parsed = parse_sources(sources, field)
    alone = len(parsed) == 1 and parsed[0].weight == 1
    loaded, tallies = [], []
    for source in parsed:
        tally = Tally(on_error, source.field)
        records = Spool(islice(_records(source, reads, tally), max_records if alone else None), directory)
        check_skipped(tally.skipped, tally.read, max_skipped, source.path, tally.examples)
        if not records:
            raise _empty(source, tally, reads)
        loaded.append(records)
        tallies.append(tally)
    drawn = [_draw(len(r), s.weight, np.random.default_rng([seed, i])) for i, (r, s) in enumerate(zip(loaded, parsed))]
    mixed, places = (of[:max_records] for of in _interleave(drawn))
    total = Tally(used=len(mixed))
    for number, (source, tally) in enumerate(zip(parsed, tallies)):
        total.absorb(tally)
        total.sources.append(
            {
                "path": source.path,
                "split": source.split,
                "weight": source.weight,
                "read": tally.read,
                "kept": tally.kept,
                "used": int(np.count_nonzero(mixed == number)),
                "dropped": dict(tally.dropped),
                "skipped": dict(tally.skipped),
            }
        )
    return Records(loaded, mixed, places), total


def _records(source: Source, reads: Reads | None, tally: Tally) -> Iterator[Record]:
    """The usable records of one source, counted as they pass."""

    def on_bad(error: BadRow) -> None:
        tally.read += 1
        tally.bad(error)

    rows = apply_preset(source, _counted(read(source, on_bad), tally), reads, tally)
    for plan, raw in _planned(source, rows, reads):
        tally.warnings += [said for said in plan.warnings if said not in tally.warnings]
        try:
            record = fit(to_record(plan, raw), reads, raw, plan)
        except SkipRow as reason:
            tally.drop(str(reason), raw.where)
            continue
        except UnknownCode as code:
            counts = _all_codes(source, plan, reads)
            raise unknown_code(source, plan.codes or Codes("", {}), plan.names, raw, str(code), counts) from None
        except BadRow as error:
            tally.bad(error)
            continue
        tally.kept += 1
        yield record


def _all_codes(source: Source, plan: ColumnPlan, reads: Reads | None) -> Counter[str]:
    """Counts the codes of the preference column; reads the whole source again."""
    rows = apply_preset(source, read(source, lambda error: None), reads, Tally("skip"))
    column = plan.names["preference"]
    return Counter(canonical(raw.row[column]) for raw in rows if column in raw.row)


def _counted(rows: Iterable[Raw], tally: Tally) -> Iterator[Raw]:
    for raw in rows:
        tally.read += 1
        yield raw


def _planned(source: Source, rows: Iterator[Raw], reads: Reads | None) -> Iterator[tuple[ColumnPlan, Raw]]:
    """Rows with the plan of their file."""
    waiting: list[Raw] = []
    plan: ColumnPlan | None = None
    known: set[str] = set()  # columns with a value so far
    for raw in rows:
        if waiting and raw.file != waiting[0].file:
            yield from _flush(source, waiting, plan, reads)
            waiting, plan = [], None
        if plan is not None:
            if late := {name for name, value in raw.row.items() if value is not None} - known:
                plan, known = widened(plan, waiting, raw, reads), known | late
            yield plan, raw
            continue
        waiting.append(raw)
        if len(waiting) == _SAMPLE:
            plan = make_plan(source, waiting, reads)
            known = {*columns_of(early.row for early in waiting)}
            yield from ((plan, early) for early in waiting)
    if waiting:
        yield from _flush(source, waiting, plan, reads)


def _flush(
    source: Source, waiting: list[Raw], plan: ColumnPlan | None, reads: Reads | None
) -> Iterator[tuple[ColumnPlan, Raw]]:
    """The rows of a file that ended before its plan was made."""
    if plan is None:
        plan = make_plan(source, waiting, reads)
        yield from ((plan, raw) for raw in waiting)


def _empty(source: Source, tally: Tally, reads: Reads | None) -> InputError:
    example = FORMS["prompt" if reads is None else reads.forms[0]].example
    if not tally.read:
        fix = f"write records into {source.path}, such as {example}"
        return InputError(f"{source.path}: no records in it", "at least one", fix)
    reasons = "; ".join(
        f"{count} {reason} (first at {tally.examples[reason][0]})" for reason, count in tally.dropped.items()
    )
    reasons += "; ".join(f"{count} {reason}, skipped" for reason, count in tally.skipped.items())
    first = min((places[0] for places in tally.examples.values()), default=source.path)
    return InputError(
        f"{source.path}: {tally.read} records, none usable" + (f": {reasons}" if reasons else ""),
        "at least one usable record",
        f"repair the records, beginning with {first}; a usable one: {example}",
    )


def _draw(count: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of the records that a source of `count` records contributes, in order.

    >>> _draw(4, 1.5, np.random.default_rng(0)).tolist()
    [0, 1, 2, 3, 2, 3]
    """
    total = max(round(weight * count), 1)
    rest = np.sort(rng.choice(count, total % count, replace=False))
    return np.concatenate([np.tile(np.arange(count), total // count), rest])


def _interleave(drawn: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Source and index of every draw, each source spread evenly over the whole.

    >>> sources, places = _interleave([np.arange(4), np.arange(2)])
    >>> list(zip(sources.tolist(), places.tolist()))
    [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """
    sources = np.repeat(np.arange(len(drawn), dtype=np.int32), [len(d) for d in drawn])
    if len(drawn) == 1:
        return sources, drawn[0]
    order = np.lexsort((sources, np.concatenate([(2 * np.arange(len(d)) + 1) / (2 * len(d)) for d in drawn])))
    return sources[order], np.concatenate(drawn)[order]
