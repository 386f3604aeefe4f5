"""The data report, before training: counts, lengths, padding and signs of bias."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.forms import slots
from jaxalign.data.tokenize import OTHER_START, REWRITTEN

if TYPE_CHECKING:
    from jaxalign.data.dataset import Dataset

# Numbers of pairs that guides recommend, by what is to be learned.
GUIDE_PAIRS = {"style": (5_000, 10_000), "facts": (30_000, 100_000), "production": (10_000, 50_000)}

_SAMPLE = 2_000  # records whose text is examined
_NOTHING = re.compile(r" is null$|^empty |^no messages$")  # reasons that mean an empty record
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_HEDGES = frozenset(
    ("maybe", "perhaps", "possibly", "probably", "likely", "seems", "seem", "might", "could", "may", "guess", "roughly")
)


def data_report(
    dataset: Dataset, tally: dict[str, Any], train: Dataset | None = None, plain: int = 0
) -> dict[str, Any]:
    """The report on a dataset, as JSON values.

    Args:
      dataset: what is reported on.
      tally: counts from reading the sources.
      train: the training data, if `dataset` is for evaluation.
      plain: records of messages that were rendered without a chat template.

    Returns:
      A nested dict; `as_text` formats it.
    """
    lengths = dataset.lengths()
    counts = dataset.counts()
    dropped = dict(tally.get("dropped", {}))
    for name, n in counts.items():
        if name.startswith("dropped: "):
            dropped[name.removeprefix("dropped: ")] = dropped.get(name.removeprefix("dropped: "), 0) + n
    shape, fill = dataset.shape, dataset.fill()
    names = slots(dataset.reads)
    total = lengths["prompt"] + lengths["completions"].max(1)
    report: dict[str, Any] = {
        "forms": list(dataset.reads.forms),
        "plain_dialogues": plain,
        "records": {
            "read": int(tally.get("read", 0)),
            "used": dataset.num_records,
            "dropped": dropped,
            "skipped": dict(tally.get("skipped", {})),
            "examples": dict(tally.get("examples", {})),
            "sources": list(tally.get("sources", [])),
        },
        # What the chat template leaves out (records), and its markers that are several tokens.
        "lost": dict(tally.get("lost", {})),
        "split_markers": dict(tally.get("markers", {})),
        # Answers that are not trained on, as the template writes them otherwise where others follow; and records whose
        # last answer begins otherwise than the generation prompt ends.
        "rewritten": dict(tally.get("rewritten", {"records": 0, "answers": 0})),
        "other_start": int(tally.get("other_start", 0)),
        "truncated": {
            "prompts": int(counts.get("prompts truncated", 0)),
            "completions": int(counts.get("completions truncated", 0)),
        },
        "tokens": {
            "prompt": int(lengths["prompt"].sum(dtype=np.int64)),
            "completion": int(lengths["completions"].sum(dtype=np.int64)),
            "scored": int(lengths["scored"].sum(dtype=np.int64)),
        },
        "lengths": {
            "prompt": _percentiles(lengths["prompt"]),
            **{name: _percentiles(lengths["completions"][:, i]) for i, name in enumerate(names)},
            "prompt and completion": _percentiles(total),
        },
        "rows": {
            "length": shape.length,
            "widths": list(dataset.widths),
            "readouts": shape.readouts,
            "completions": shape.completions,
            "per_batch": shape.rows,
            "per_epoch": dataset.num_rows,
            "batches_per_epoch": dataset.batches_per_epoch,
            "padding_share": round(1.0 - fill, 6),
        },
        "duplicates": {
            "records": _repeated(dataset.keys("digest")),
            "prompts": _repeated(dataset.keys("prompt_key")),
        },
        "finished_share": _mean(lengths["complete"][:, : len(names)]) if names else None,
    }
    if len(names) == 2:
        report["pairs"] = _pairs(dataset, lengths, dropped)
        report["guides"] = {"pairs": dataset.num_records, **{name: list(span) for name, span in GUIDE_PAIRS.items()}}
    if train is not None:
        report["overlap"] = {
            "prompts": int(np.isin(dataset.keys("prompt_key"), train.keys("prompt_key")).sum()),
            "records": int(np.isin(dataset.keys("digest"), train.keys("digest")).sum()),
        }
    report["warnings"] = [*tally.get("warnings", ()), *_warnings(report)]
    return report


def _percentiles(values: np.ndarray) -> dict[str, float]:
    quantiles = np.percentile(values, [0, 50, 90, 99, 100], method="inverted_cdf")
    named = {name: int(q) for name, q in zip(("min", "p50", "p90", "p99", "max"), quantiles, strict=True)}
    return {**named, "mean": _mean(values)}


def _mean(values: np.ndarray) -> float:
    return round(float(np.mean(values)), 4) if np.size(values) else 0.0


def _repeated(keys: np.ndarray) -> int:
    """Records beyond the first of each kind."""
    return int(len(keys) - len(np.unique(keys)))


def _pairs(dataset: Dataset, lengths: dict[str, np.ndarray], dropped: dict[str, int]) -> dict[str, Any]:
    """Differences between chosen and rejected that a model may learn instead of quality."""
    chosen, rejected = lengths["completions"][:, 0].astype(float), lengths["completions"][:, 1].astype(float)
    step = max(dataset.num_records // _SAMPLE, 1)
    examples = [dataset.example(i) for i in range(0, dataset.num_records, step)]
    sides = [[e.completions[side] for e in examples] for side in (0, 1)]
    records = [dataset.record(i) for i in range(0, dataset.num_records, step)]
    texts = [[_text(getattr(r, side)) for r in records] for side in ("chosen", "rejected")]
    both = {"chosen": 0, "rejected": 1}
    return {
        "equal": sum(n for reason, n in dropped.items() if "equal" in reason),
        "length_gap": _mean(chosen - rejected),
        "length_gap_share": round(float((chosen.sum() - rejected.sum()) / rejected.sum()), 4),
        "chosen_longer": _mean(chosen > rejected),
        "same_length": _mean(chosen == rejected),
        # Share of a completion's tokens that occur in its prompt.
        "echo": {
            n: _mean(np.array([np.isin(e.completions[s], e.prompt).mean() for e in examples])) for n, s in both.items()
        },
        # Hedging words per hundred.
        "hedges": {name: _hedges(texts[side]) for name, side in both.items()},
        # Share of distinct token bigrams, over equally many tokens: low if records repeat each other.
        "variety": dict(zip(both, _variety(*sides), strict=True)),
    }


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(m.get("content", "")) for m in content if m.get("role") == "assistant")
    return content or ""


def _hedges(texts: list[str]) -> float:
    words = [word for text in texts for word in _WORD.findall(text.lower())]
    return round(100 * sum(word in _HEDGES for word in words) / max(len(words), 1), 3)


def _variety(chosen: list[np.ndarray], rejected: list[np.ndarray]) -> list[float]:
    sides: list[np.ndarray] = []
    for completions in (chosen, rejected):
        pairs = [c[:-1].astype(np.int64) << 32 | c[1:].astype(np.int64) for c in completions if len(c) > 1]
        sides.append(np.concatenate(pairs) if pairs else np.zeros(0, np.int64))
    n = min(map(len, sides))
    return [round(len(np.unique(s[:n])) / n, 4) if n else 0.0 for s in sides]


def _warnings(report: dict[str, Any]) -> list[str]:
    """Warnings about what looks wrong."""
    records, found = report["records"], []
    if report["plain_dialogues"] and "overlap" not in report:  # for the training data only
        found.append(
            f"records of messages: {report['plain_dialogues']}; the tokenizer has no chat template, so they are written"
            " as plain text (\\n\\nHuman: ... \\n\\nAssistant: ..., Alpaca columns as ### Instruction:); with"
            " config.model.chat_template=FILE.jinja a template is used, and goes with the export"
        )
    if report["lost"] and "overlap" not in report:
        fold = ", --config.data.system_turns=fold writes system turns into the user's"
        found.append(
            f"left out by the chat template: {_placed(report['lost'], records)}; what is not rendered is not learned:"
            " --config.model.chat_template=FILE.jinja gives a template that writes it"
            + fold
            * ("system turns" in report["lost"])
        )
    if (rewritten := report["rewritten"])["records"] and "overlap" not in report:
        found.append(
            f"answers that the chat template rewrites where others follow, without their thoughts:"
            f" {rewritten['answers']} of {rewritten['records']} records"
            f" ({_joined(records['examples'].get(REWRITTEN, ()))}); they are not trained on, the last answer of each"
            " record is. --config.data.train_on=last if that is meant; else a record for each answer, or a value of the"
            " template's that keeps them (--config.data.chat_template_kwargs)"
        )
    if report["other_start"] and "overlap" not in report:
        found.append(
            f"answers that do not begin with the generation prompt: {report['other_start']} records"
            f" ({_joined(records['examples'].get(OTHER_START, ()))}); the model is asked with another beginning than it"
            " learns: a value of the template's (--config.data.chat_template_kwargs) or another template"
            " (--config.model.chat_template=FILE.jinja) writes both alike"
        )
    if (split := report["split_markers"]) and "overlap" not in report:
        found.append(
            f"the chat template's markers {', '.join(f'{m} ({n} tokens)' for m, n in split.items())} are no tokens of"
            " this tokenizer: they merge with the text beside them, so that the loss mask is off by a character, and no"
            " stop token ends a turn; take a template whose markers the tokenizer has"
            " (--config.model.chat_template=FILE.jinja) or a tokenizer that has them"
        )
    if skipped := records["skipped"]:
        found.append(
            f"{sum(skipped.values())} of {records['read']} rows are wrong and skipped: {_placed(skipped, records)}"
        )
    lost = sum(records["dropped"].values())
    if lost > 0.05 * (records["used"] + lost):
        found.append(f"{lost} of {records['used'] + lost} records are left out: {_counts(records['dropped'])}")
    elif empty := {reason: n for reason, n in records["dropped"].items() if _NOTHING.search(reason)}:
        found.append(f"{sum(empty.values())} records hold nothing and are left out: {_placed(empty, records)}")
    cut = sum(report["truncated"].values())
    if cut > 0.05 * records["used"]:
        found.append(f"{cut} prompts or completions are truncated: longer limits, or another truncation policy")
    by_weight = sum(max(source["used"] - source["kept"], 0) for source in records["sources"])
    if (repeated := report["duplicates"]["records"] - by_weight) > 0.01 * records["used"]:
        found.append(f"{repeated} records repeat others")
    overlap = report.get("overlap")
    if overlap and overlap["prompts"]:
        found.append(f"{overlap['prompts']} held-out records have prompts that training has too")
    pairs = report.get("pairs")
    if not pairs:
        return found
    low, high = GUIDE_PAIRS["style"]
    if report["guides"]["pairs"] < low:
        found.append(
            f"{report['guides']['pairs']} pairs; guides call for {low:,} to {high:,} to teach a style, more for facts"
        )
    longer = pairs["chosen_longer"] / max(1 - pairs["same_length"], 1e-9)
    if abs(longer - 0.5) > 0.15 and abs(pairs["length_gap_share"]) > 0.1:
        side = "chosen" if longer > 0.5 else "rejected"
        found.append(
            f"the {side} completion is the longer one in {max(longer, 1 - longer):.0%} of pairs of unequal length"
            f" (gap {pairs['length_gap']:+.1f} tokens): the model may learn length"
        )
    echo = pairs["echo"]
    if echo["chosen"] > 1.3 * echo["rejected"] + 0.02:
        found.append(
            f"chosen completions echo the prompt: {echo['chosen']:.0%} of their tokens, rejected {echo['rejected']:.0%}"
        )
    hedges = pairs["hedges"]
    if min(hedges.values()) * 1.5 + 0.05 < max(hedges.values()):
        found.append(f"hedging words in a hundred: chosen {hedges['chosen']:.2f}, rejected {hedges['rejected']:.2f}")
    variety = pairs["variety"]
    if variety["rejected"] < 0.6 * variety["chosen"]:
        found.append("rejected completions come from a narrow region: the model may become over-cautious; broaden them")
    return found


def _counts(counts: dict[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {n}" for reason, n in ranked) or "none"


def _placed(counts: dict[str, int], records: dict[str, Any]) -> str:
    """Counts by reason, each with a few places."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{reason} {n} ({_joined(records['examples'].get(reason, ()))})" for reason, n in ranked]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more reasons" if len(shown) > 8 else "")


def _joined(places: list[str] | tuple[str, ...]) -> str:
    """Places as file:line; the file is not repeated.

    >>> _joined(["a.jsonl:3", "a.jsonl:9", "b.jsonl:1"])
    'a.jsonl:3, :9, b.jsonl:1'
    """
    files = ["", *(place.rpartition(":")[0] for place in places)]
    return ", ".join(p.removeprefix(before) if before else p for p, before in zip(places, files, strict=False))


def as_text(report: dict[str, Any]) -> str:
    """A report as lines of plain text."""
    records, rows, tokens = report["records"], report["rows"], report["tokens"]
    lines = [
        ("records", f"{records['read']:,} read, {records['used']:,} used"),
        ("dropped", _counts(records["dropped"])),
        *([("skipped", _placed(records["skipped"], records))] if records["skipped"] else []),
        (
            "truncated",
            f"{report['truncated']['prompts']:,} prompts, {report['truncated']['completions']:,} completions",
        ),
        ("duplicates", f"{report['duplicates']['records']:,} records, {report['duplicates']['prompts']:,} prompts"),
        ("tokens", f"{tokens['prompt']:,} prompt, {tokens['completion']:,} completion, {tokens['scored']:,} scored"),
    ]
    for name, p in report["lengths"].items():
        lines.append(
            (name, " ".join(f"{k} {p[k]}" for k in ("min", "p50", "p90", "p99", "max")) + f" mean {p['mean']:.1f}")
        )
    size = f"{rows['per_batch']} x {' or '.join(map(str, rows['widths']))} tokens, {rows['readouts']} readouts"
    lines.append(("rows", f"{rows['per_epoch']:,} an epoch, {size}, padding {rows['padding_share']:.1%}"))
    if report["lost"]:
        lines.append(("left out", _placed(report["lost"], records)))
    if report.get("finished_share") is not None:
        lines.append(("finished", f"{report['finished_share']:.1%} of completions end by EOS"))
    if pairs := report.get("pairs"):
        gap = f"{pairs['length_gap']:+.1f} tokens, chosen longer in {pairs['chosen_longer']:.0%}"
        lines.append(("length gap", f"{gap}, same length in {pairs['same_length']:.0%}"))
        for name in ("echo", "hedges", "variety"):
            lines.append((name, f"chosen {pairs[name]['chosen']}, rejected {pairs[name]['rejected']}"))
        spans = ", ".join(f"{name} {low:,}-{high:,}" for name, (low, high) in GUIDE_PAIRS.items())
        lines.append(("pairs", f"{report['guides']['pairs']:,}; guides: {spans}"))
    if overlap := report.get("overlap"):
        lines.append(("overlap", f"{overlap['prompts']:,} prompts, {overlap['records']:,} records also in training"))
    width = max(len(name) for name, _ in lines)
    return "\n".join([*(f"{name:<{width}}  {text}" for name, text in lines), *(f"! {w}" for w in report["warnings"])])
