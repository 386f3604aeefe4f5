"""Records to examples: token ids, and which of them are scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxalign.data.forms import FORMS
from jaxalign.data.omissions import unread_tools
from jaxalign.data.records import Message, Notes, Record
from jaxalign.data.template import ChatTemplate
from jaxalign.data.template_inputs import inputs_of
from jaxalign.data.turns import Rendered, common_prefix
from jaxalign.errors import InputError

_CHUNK = 512  # records tokenised in one call
LOST = "lost: "  # prefix in notes: what the chat template leaves out
REWRITTEN = "answers that the chat template rewrites"  # in notes: records with some, and under `NUM_REWRITTEN` how many
NUM_REWRITTEN = "rewritten answers"
OTHER_START = "answers that do not begin with the generation prompt"  # in notes


class Example(NamedTuple):
    """One record as tokens."""

    record: int  # number of the record in the dataset
    prompt: np.ndarray  # int32 [P], P >= 1
    completions: tuple[np.ndarray, ...]  # int32 [R] each: none (a prompt), one, or chosen and rejected
    masks: tuple[np.ndarray, ...]  # bool [R] each: which tokens of the completion are scored
    complete: tuple[bool, ...]  # whether the completion ends by EOS
    weight: float
    score: float


class Dropped(NamedTuple):
    """A record without an example, and why."""

    record: int
    reason: str
    needs: tuple[tuple[str, int], ...] = ()  # (limit, how large it must be for the whole record)
    wrong: bool = False  # whether it cannot be rendered, rather than holds nothing usable


class Encoded(NamedTuple):
    """A tokenised text, with character offsets."""

    text: str
    ids: np.ndarray  # int32 [N]
    before: Callable[[int], int]  # number of leading tokens that end at or before a character
    after: Callable[[int], int]  # number of leading tokens that start before a character


class TrainOn(NamedTuple):
    """What the loss mask covers: `data.train_on` and `data.train_on_eos`."""

    what: str = "completion"  # completion, last, all, or roles joined by commas
    eos: str = "turn"  # which end-of-turn tokens are scored: turn (each), last, none

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose turns are scored; empty for completion, last and all."""
        return () if self.what in ("completion", "last", "all") else tuple(self.what.replace(" ", "").split(","))


class Encoder:
    """Wraps a tokenizer: whole texts, at most one BOS, character offsets.

    Args:
      tokenizer: a `transformers` tokenizer.
      eos_ids: every id that ends a completion; the tokenizer's own is always among them.
      plain: renderer of messages where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer, eos_ids: Iterable[int] = (), plain=None):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, plain)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids) | ({self.eos_id} if self.eos_id is not None else set())
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = full[:at]  # the special tokens that the tokenizer prepends

    def encode(self, texts: Sequence[str], templated: Sequence[bool]) -> list[Encoded]:
        """Tokenises whole texts.

        A templated text gets no special tokens beside its own, as `apply_chat_template` does; a plain one gets
        the tokenizer's own prefix.  Either way it starts with one BOS at most.
        """
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        out = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=fast,
            return_attention_mask=False,
            verbose=False,
        )
        offsets = out["offset_mapping"] if fast else [None] * len(texts)
        return [
            self._encoded(text, ids, spans, [] if in_template else self.prefix)
            for text, ids, spans, in_template in zip(texts, out["input_ids"], offsets, templated, strict=True)
        ]

    def ids(self, text: str, templated: bool = False) -> np.ndarray:
        """Token ids of one text."""
        return self.encode([text], [templated])[0].ids

    def _encoded(self, text: str, ids: list[int], offsets, prefix: list[int]) -> Encoded:
        cut = 0
        while self.bos_id is not None and ids[cut : cut + 2] == [self.bos_id, self.bos_id]:
            cut += 1
        if prefix and ids[cut : cut + 1] == [self.bos_id]:
            prefix = [t for t in prefix if t != self.bos_id]
        added = len(prefix) - cut
        tokens = np.asarray(prefix + ids[cut:], np.int32)
        if offsets is None:
            return Encoded(text, tokens, *self._boundaries_by_prefix(text, ids, added))
        starts, ends = np.asarray(offsets, np.int32).reshape(-1, 2).T
        ends = np.maximum.accumulate(ends) if len(ends) else ends
        starts = np.maximum.accumulate(starts) if len(starts) else starts

        def before(char: int) -> int:
            return max(int(np.searchsorted(ends, char, side="right")) + added, 0)

        def after(char: int) -> int:
            return max(int(np.searchsorted(starts, char, side="left")) + added, 0)

        return Encoded(text, tokens, before, after)

    def _boundaries_by_prefix(self, text: str, ids: list[int], added: int):
        """`before` and `after` for a tokenizer without offsets, by tokenising the text up to the character."""

        def head(char: int) -> list[int]:
            return list(self.tokenizer(text[:char], add_special_tokens=False, verbose=False)["input_ids"])

        def before(char: int) -> int:
            return max((len(ids) if char >= len(text) else common_prefix(ids, head(char))) + added, 0)

        def after(char: int) -> int:
            if char >= len(text):
                return len(ids) + added
            tokens = head(char)
            kept = common_prefix(ids, tokens)
            return max(kept + (kept < len(tokens)) + added, 0)

        return before, after


class _Part(NamedTuple):
    """One rendered sequence of a record, before tokenisation."""

    rendered: Rendered
    templated: bool
    messages: Sequence[Message] = ()  # that were rendered


def _conversation(encoder: Encoder, record: Record, messages, train_on: TrainOn, first: int = 0) -> _Part:
    template, roles = encoder.template, train_on.roles
    given = inputs_of(record.columns)
    if roles:
        rendered = template.conversation(messages, 0, given, roles=roles)
    else:
        last = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight") != 0][-1:]
        if train_on.what == "last" and last:
            first = last[0]
        rendered = template.conversation(messages, first, given)
    if train_on.what == "last" and rendered.spans:
        rendered = rendered._replace(boundary=rendered.spans[0][0])
    return _Part(rendered, not template.is_plain, messages)


def _sequence(encoder: Encoder, record: Record, prompt, completion, train_on: TrainOn) -> _Part:
    """Prompt and completion as one text; strings are concatenated, messages rendered by the template."""
    if isinstance(completion, str):
        start, text = len(prompt or ""), (prompt or "") + completion
        roles = train_on.roles if prompt else ()
        spans = [(0, start)] * ("user" in roles) + [(start, len(text))] * (not roles or "assistant" in roles)
        spans = [(a, b) for a, b in spans if a < b]
        return _Part(Rendered(text, tuple(spans), spans[0][0] if spans else start), False)
    before = list(prompt or [])
    return _conversation(encoder, record, before + list(completion), train_on, len(before))


def _prompt(encoder: Encoder, record: Record) -> _Part:
    prompt = record.prompt or ""
    if isinstance(prompt, str):
        return _Part(Rendered(prompt, (), len(prompt)), False)
    template = encoder.template
    text = template.prompt(prompt, inputs_of(record.columns))
    return _Part(Rendered(text, (), len(text)), not template.is_plain, prompt)


def _parts(encoder: Encoder, record: Record, train_on: TrainOn) -> list[_Part]:
    """The sequences of a record: its prompt with each of its completions, or alone."""
    completions = FORMS[record.form].completions
    if not completions:
        return [_prompt(encoder, record)]
    return [_sequence(encoder, record, record.prompt, getattr(record, said), train_on) for said in completions]


def _scored(encoder: Encoder, encoded: Encoded, rendered: Rendered) -> np.ndarray:
    """bool [N]: tokens that overlap an assistant span, each turn ending at its EOS."""
    mask = np.zeros(len(encoded.ids), bool)
    for (start, end), words_end in zip(
        rendered.spans, rendered.words_end or [e for _, e in rendered.spans], strict=True
    ):
        first, last = encoded.before(start), encoded.after(end)
        behind = encoded.before(words_end)
        stops = behind + np.flatnonzero(np.isin(encoded.ids[behind:last], list(encoder.eos_ids)))
        if len(stops):  # a template may write the next turn's header after it
            last = int(stops[0]) + 1
        mask[first : _end(encoder, encoded.ids, first, last)] = True
    return mask


def _end(encoder: Encoder, ids: np.ndarray, first: int, last: int) -> int:
    """The end of `ids[first:last]` without white space after EOS, which is never generated, so never scored."""
    ends = first + np.flatnonzero(np.isin(ids[first:last], list(encoder.eos_ids)))
    blank = len(ends) and not encoder.tokenizer.decode(ids[ends[-1] + 1 : last].tolist()).strip()
    return int(ends[-1]) + 1 if blank else last


def _without_prompt(encoder: Encoder, sequences: list[np.ndarray], masks: list[np.ndarray], shared: int):
    """Gives sequences without a prompt one of a single token: BOS, or their common first token."""
    if shared:
        return sequences, masks, shared
    if encoder.bos_id is not None and not any(len(s) and s[0] == encoder.bos_id for s in sequences):
        sequences = [np.concatenate([[encoder.bos_id], s]).astype(np.int32) for s in sequences]
        masks = [np.concatenate([[False], m]) for m in masks]
        return sequences, masks, 1
    heads = {int(s[0]) if len(s) else -1 for s in sequences}
    return sequences, masks, 1 if len(heads) == 1 and heads != {-1} else 0


def _example(encoder: Encoder, record: Record, parts, encoded: list[Encoded], train_on: TrainOn, append_eos: bool):
    """One record's example, or Dropped with the reason."""
    weight, score = float(record.weight), float(record.score)
    sequences = [e.ids for e in encoded]
    if not FORMS[record.form].completions:
        prompt = sequences[0]
        if not len(prompt) and encoder.bos_id is not None:
            prompt = np.asarray([encoder.bos_id], np.int32)
        if not len(prompt):
            return Dropped(record.index, "empty prompt")
        return Example(record.index, prompt, (), (), (), weight, score)

    masks = [_scored(encoder, e, part.rendered) for e, part in zip(encoded, parts, strict=True)]
    for tokens, mask in zip(sequences, masks, strict=True):
        if not any(int(t) not in encoder.eos_ids for t in tokens[mask]):
            rewritten = any(part.rendered.rewritten for part in parts)
            if not rewritten or train_on.what != "all":
                return Dropped(record.index, REWRITTEN if rewritten else "empty completion")
    stated = [e.before(part.rendered.boundary) for e, part in zip(encoded, parts, strict=True)]
    shared = min(stated)
    if len(sequences) == 2:
        shared = min(shared, common_prefix(*(s[:shared].tolist() for s in sequences)))
    if train_on.what == "all":
        shared = min(shared, int(bool(encoder.prefix) and sequences[0][0] == encoder.bos_id))
        masks = [np.ones(len(s), bool) for s in sequences]
        for tokens, mask in zip(sequences, masks, strict=True):
            mask[_end(encoder, tokens, 0, len(tokens)) :] = False
    same = len({part.rendered.text[: part.rendered.boundary] for part in parts}) == 1
    for tokens, mask, end in zip(sequences, masks, stated, strict=True):
        if same:  # else a side's own prompt goes on beyond the shared one: nothing in it is scored
            mask[shared:end] = True  # prompt tokens that the other side's merge moved into the completion
        if train_on.eos != "turn":
            ends = np.flatnonzero(mask & np.isin(tokens, list(encoder.eos_ids)))
            mask[ends[:-1] if train_on.eos == "last" else ends] = False
    sequences, masks, shared = _without_prompt(encoder, sequences, masks, shared)
    if not shared:
        return Dropped(record.index, "no prompt, and the tokenizer has no BOS token")

    completions, kept, complete = [], [], []
    for tokens, mask in zip(sequences, masks, strict=True):
        tokens, mask = tokens[shared:], mask[shared:]
        last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        tokens, mask = tokens[:last], mask[:last]  # nothing after the last scored token is needed
        if not last:
            return Dropped(record.index, "empty completion")
        if append_eos and int(tokens[-1]) not in encoder.eos_ids:
            tokens, mask = np.append(tokens, encoder.eos_id), np.append(mask, True)
        completions.append(tokens.astype(np.int32))
        kept.append(mask)
        complete.append(int(tokens[-1]) in encoder.eos_ids)
    if len(completions) == 2 and np.array_equal(completions[0], completions[1]):
        return Dropped(record.index, "chosen equals rejected")
    return Example(record.index, sequences[0][:shared], tuple(completions), tuple(kept), tuple(complete), weight, score)


def tokenize_records(
    records: Iterable[Record],
    encoder: Encoder,
    *,
    append_eos: bool,
    train_on: str = "completion",
    train_on_eos: str = "turn",
    on_error: str = "stop",
    notes: Notes | None = None,
) -> Iterator[Example | Dropped]:
    """Turns records into examples, in order, a few hundred at a time.

    The whole rendered text is tokenised once, so that training tokens are what `apply_chat_template` gives.
    A pair's prompt is the longest common token prefix that ends at or before the stated boundary: a token that
    merges over it moves into the completions of both.

    Args:
      records: `Record`s.
      encoder: the tokenizer.
      append_eos: whether a completion that lacks an EOS gets one.
      train_on: the loss mask: "completion", of messages all assistant turns; "last", the last of these; "all", the
        prompt too; or roles joined by commas ("assistant,tool"), all their turns, in the prompt too.
      train_on_eos: which end-of-turn tokens of these are scored: "turn", each; "last", the last; "none", and none is
        appended.
      on_error: "stop" at a record that cannot be rendered, or "skip" it.
      notes: counts what the chat template leaves out, under `LOST` and its name; None: not counted.

    Yields:
      An Example, or Dropped with the reason.

    Raises:
      InputError: naming the record that cannot be rendered.
    """
    if append_eos and encoder.eos_id is None:
        raise InputError("a tokenizer without an EOS token", "an EOS to append", "--config.data.append_eos=False")
    scoring = TrainOn(train_on, train_on_eos)
    append_eos = append_eos and train_on_eos != "none"
    stream = iter(records)
    while chunk := list(islice(stream, _CHUNK)):
        parts: list[list[_Part]] = []
        wrong: dict[int, str] = {}
        for number, record in enumerate(chunk):
            try:
                parts.append(_parts(encoder, record, scoring))
                if notes is not None:
                    _note(encoder, record, parts[-1], scoring, notes)
            except InputError as error:
                if on_error == "skip":
                    parts.append([])
                    wrong[number] = _reason(error)
                    continue
                where = f"record {record.index} (line {record.line} of {record.source})"
                raise error.within(where) from error
        flat = [part for record_parts in parts for part in record_parts]
        encoded = iter(encoder.encode([p.rendered.text for p in flat], [p.templated for p in flat]))
        for number, (record, record_parts) in enumerate(zip(chunk, parts, strict=True)):
            own = [next(encoded) for _ in record_parts]
            if number in wrong:
                yield Dropped(record.index, wrong[number], wrong=True)
            else:
                yield _example(encoder, record, record_parts, own, scoring, append_eos)


def _note(encoder: Encoder, record: Record, parts: list[_Part], train_on: TrainOn, notes: Notes) -> None:
    """Counts what the template left out of a record or wrote otherwise, once for each kind."""
    rewritten = sorted({i for part in parts for i in part.rendered.rewritten}) if train_on.what != "all" else []
    if rewritten:
        notes.add(REWRITTEN, record, f" message {rewritten[0] + 1}")
        notes[NUM_REWRITTEN] += sum(len(part.rendered.rewritten) for part in parts)
    if any(part.rendered.other_start for part in parts):
        notes.add(OTHER_START, record)
    given = inputs_of(record.columns)
    lost: dict[str, None] = {}
    for part in parts:
        if not part.messages:
            continue
        prompt = not FORMS[record.form].completions
        lost |= dict.fromkeys(encoder.template.left_out(part.messages, part.rendered.text, given, prompt=prompt))
        if unread_tools(record.columns, given.tools):
            lost["tools (a column that is no list of schemas)"] = None
    for name in lost:
        notes.add(LOST + name, record)


def _reason(error: InputError) -> str:
    """The reason why a record cannot be rendered, without the record's own text, so that equal reasons are counted."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "...", re.sub(r" \([^()]*\)", "", error.found))
    return text.splitlines()[0][:120]
