"""The stories run's data: IMDb and preference sets in disjoint splits, written as files.

IMDb's two halves serve two sides that never meet: from the training half come all texts that models learn from or are
asked about, the test half teaches the judge alone.  Reviews that stand in both are left to the judge.

    training half, shuffled once  ->  held-out | prompts | the rest: SFT texts and preference pairs
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.dialogues import is_dialogue, parse_dialogue
from jaxalign.errors import InputError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Review = dict[str, Any]  # text, label (1 = positive)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl or jsonl.gz file; what ends a line is a newline alone (reviews hold U+0085).

    Raises:
      InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file", "the real data beside the checkout", "export JAXALIGN_SHARED=DIR")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes a jsonl file whole or not at all, and says how many lines it has."""
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    draft.rename(path)
    return len(lines)


def opening(text: str, max_words: int) -> str:
    """The whole sentences that a text begins with, of at most so many words; nothing where the first is longer.

    >>> opening("A gem. I cried twice! Go and see it.", 5)
    'A gem. I cried twice!'
    """
    return " ".join(_fitting(_SENTENCE_END.split(text.strip()), max_words))


def closing(text: str, max_words: int) -> str:
    """The whole sentences that a text ends with, likewise.

    >>> closing("A gem. I cried twice! Go and see it.", 8)
    'I cried twice! Go and see it.'
    """
    return " ".join(_fitting(_SENTENCE_END.split(text.strip())[::-1], max_words)[::-1])


def _fitting(sentences: Sequence[str], max_words: int) -> list[str]:
    kept, count = [], 0
    for sentence in sentences:
        count += len(sentence.split())
        if count > max_words:
            break
        kept.append(" ".join(sentence.split()))
    return kept


def split_reviews(train: Sequence[Review], judged: Sequence[Review], sizes: Sequence[int]) -> list[list[Review]]:
    """Parts of the training half, without texts that stand twice or in the judge's half; the last part is the rest.

    >>> rows = [{"text": t} for t in "abcad"]
    >>> [[r["text"] for r in part] for part in split_reviews(rows, [{"text": "d"}], [1])]
    [['a'], ['b', 'c']]
    """
    seen = {review["text"] for review in judged}
    kept = []
    for review in train:
        if review["text"] not in seen:
            seen.add(review["text"])
            kept.append(review)
    parts = []
    for size in sizes:
        parts.append(kept[:size])
        kept = kept[size:]
    return [*parts, kept]


def passages(reviews: Sequence[Review], cut: Callable[[str, int], str], few: int, most: int) -> list[Review]:
    """Openings or closings of reviews with their labels, of `few` to `most` words; reviews without one are left out."""
    cuts = [{"text": cut(review["text"], most), "label": review["label"]} for review in reviews]
    return [c for c in cuts if len(c["text"].split()) >= few]


def prompts(reviews: Sequence[Review], words: int, taken: set[str]) -> list[dict[str, str]]:
    """The first words of reviews, each beginning once and none that is in `taken`, to which these are added.

    >>> prompts([{"text": "I saw this film"}, {"text": "I saw it"}], 2, set())
    [{'prompt': 'I saw'}]
    """
    found = []
    for review in reviews:
        prompt = " ".join(review["text"].split()[:words])
        if prompt not in taken:
            taken.add(prompt)
            found.append({"prompt": prompt})
    return found


def label_pairs(texts: Sequence[Review]) -> Iterator[dict[str, str]]:
    """Pairs of a positive and a negative text, of like length, so that length tells nothing.

    >>> next(label_pairs([{"text": "Dull.", "label": 0}, {"text": "Great.", "label": 1}]))
    {'prompt': '', 'chosen': 'Great.', 'rejected': 'Dull.'}
    """
    sides = [
        sorted((t["text"] for t in texts if t["label"] == label), key=lambda s: (len(s.split()), s)) for label in (1, 0)
    ]
    few = min(map(len, sides))
    evenly = [[side[i * len(side) // few] for i in range(few)] for side in sides]
    for chosen, rejected in zip(*evenly, strict=True):
        yield {"prompt": "", "chosen": chosen, "rejected": rejected}


def dialogues(folder: Path, most: int, characters: int) -> list[dict[str, str]]:
    """Pairs of Anthropic's sets, as they stand, of all files in turn: those short enough for a small model.

    Args:
      folder: of hh-rlhf.
      most: pairs.
      characters: of the longer side.
    """
    files = [read_lines(path) for path in sorted(folder.glob("*.jsonl.gz"))]
    if not files:
        raise InputError(f"{folder}: no *.jsonl.gz in it", "hh-rlhf", "export JAXALIGN_SHARED=DIR")
    fit = [
        [
            row
            for row in rows
            if max(len(row["chosen"]), len(row["rejected"])) <= characters and is_dialogue(row["chosen"])
        ]
        for rows in files
    ]
    longest = max(map(len, fit))
    mixed = [rows[i] for i in range(longest) for rows in fit if i < len(rows)]
    return mixed[:most]


def hold_out(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any], count: int):
    """(training rows, held-out rows): the last rows are held out, with all that share a key with them.

    >>> hold_out([{"q": 1}, {"q": 2}, {"q": 1}], lambda row: row["q"], 1)
    ([{'q': 2}], [{'q': 1}, {'q': 1}])
    """
    kept = {key(row) for row in rows[len(rows) - count :]}
    return [r for r in rows if key(r) not in kept], [r for r in rows if key(r) in kept]


def first_turn(row: dict[str, Any]) -> str:
    """What opens the dialogue of a pair."""
    return parse_dialogue(row["chosen"])[0]["content"]


def longer_is_better(rows: Sequence[dict[str, Any]]) -> float:
    """How often the longer side is the chosen one: what a reward model has to beat; equals count half."""
    signs = [(len(r["chosen"]) > len(r["rejected"])) + (len(r["chosen"]) == len(r["rejected"])) / 2 for r in rows]
    return sum(signs) / len(signs)


def write_data(directory: Path, shared: Path, sizes: Any) -> dict[str, Any]:
    """Writes every file that the stages read before any is sampled.

    Args:
      directory: receives `NAME.jsonl` and `NAME_heldout.jsonl`.
      shared: holds `data/imdb`, `data/rasbt-preference`, `data/hh-rlhf`.
      sizes: the `prepare` section of the config.

    Returns:
      Counts of each file, and `longer_is_better` of the held-out pairs.
    """
    s, counts, longer = sizes, {}, {}

    def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
        rows = list(rows)
        counts[name] = write_lines(directory / f"{name}.jsonl", rows)
        if name.endswith("_heldout") and rows and "chosen" in rows[0]:
            longer[name.removesuffix("_heldout")] = longer_is_better(rows)

    train, judged = (read_lines(shared / "data/imdb" / f"{half}.jsonl.gz") for half in ("train", "test"))
    heldout, asked, rest = split_reviews(train, judged, (s.heldout_reviews, s.prompt_reviews))
    span = s.min_words, s.max_words
    openings = passages(rest, opening, *span)
    write("reviews", ({"text": t["text"]} for t in openings[: s.sft_reviews]))
    write("reviews_heldout", ({"text": t["text"]} for t in passages(heldout, opening, *span)))
    labelled = rest[: s.labelled_reviews]
    write("labels", [p for cut in (opening, closing) for p in label_pairs(passages(labelled, cut, *span))])
    write("labels_heldout", [p for cut in (opening, closing) for p in label_pairs(passages(heldout, cut, *span))])
    taken: set[str] = set()
    write("prompts", prompts(asked, s.prompt_words, taken))
    write("prompts_heldout", prompts(heldout, s.prompt_words, taken)[: s.heldout_prompts])
    write("judge_reviews", heldout + asked + rest[:3000])

    polite = json.loads((shared / "data/rasbt-preference/instruction-data-with-preference.json").read_text())
    both = hold_out(polite, lambda row: (row["instruction"], row["input"]), s.polite_heldout)
    for name, rows in zip(("polite", "polite_heldout"), both, strict=True):
        write(name, rows)
    pairs = dialogues(shared / "data/hh-rlhf", s.dialogues, s.dialogue_characters)
    for name, rows in zip(("hh", "hh_heldout"), hold_out(pairs, first_turn, s.dialogues_heldout), strict=True):
        write(name, rows)
    return {"counts": counts, "longer_is_better": longer}
