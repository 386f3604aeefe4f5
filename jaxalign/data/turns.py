"""One conversation under a chat template: its text, and where the turns that are scored are in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxalign.data.omissions import with_system_turns
from jaxalign.data.records import Message
from jaxalign.data.template_inputs import TemplateInputs
from jaxalign.data.thoughts import KEYS, after_markers, before_marker, has_thoughts, outside_marker, under_key
from jaxalign.errors import InputError

Span = tuple[int, int]  # half-open range of characters

_SENTINEL = "\ue000"  # a private-use character: no real message begins or ends with it
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # scored turns, with their end-of-turn text, in order
    boundary: int  # character at which the prompt ends
    words_end: tuple[int, ...] = ()  # end of the message's content in each span; the span's end if unknown
    rewritten: tuple[int, ...] = ()  # messages that are written otherwise where others follow, and have no span
    other_start: bool = False  # the last turn does not begin with the generation prompt


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix of two strings or lists, by bisection.

    >>> common_prefix("Paris", "Parrot")
    3
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Renderer(NamedTuple):
    """What makes text of messages."""

    tokenizer: Any  # of transformers
    plain: Callable[[list[Message], bool], str] | None  # in place of a chat template, where the tokenizer has none
    is_plain: bool
    thoughts_keys: tuple[str, ...]  # of messages, that the template reads


class Conversation:
    """One conversation under one template."""

    def __init__(self, template: Renderer, messages: Sequence[Message], given: TemplateInputs):
        self._template, self._given = template, given
        bare = ({k: v for k, v in m.items() if v is not None and k != "weight"} for m in messages)
        self._messages = [under_key(m, template.thoughts_keys) for m in bare]
        self._parts: dict[tuple[int, bool], str | None] = {}  # rendered, by number of messages and generation prompt
        self._said = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        self._weighted = [i for i, m in enumerate(messages) if m.get("weight") != 0]
        self._scored = [i for i in self._said if i in self._weighted]

    def rendered(self, first: int, roles: tuple[str, ...] = ("assistant",)) -> Rendered:
        """The text, and the turns of `roles` from message `first` on; see `ChatTemplate.conversation`."""
        if roles != ("assistant",):
            return self._rendered_roles(first, roles)
        wanted = [i for i in self._scored if i >= first]
        marked, rewritten = self._marked(), []
        if marked is None:
            text = self.render(len(self._messages))
            turns = {i: self._turn(i, text) for i in wanted}
            rewritten = [i for i, span in turns.items() if self._is_rewritten(i, span, text)]
            wanted = [i for i in wanted if i not in rewritten]
            spans = [turns[i] for i in wanted]
        else:
            text, pieces = marked
            spans = self._marked_turns(pieces, wanted, text)
        ends = [span[1] for span in spans]
        if len(spans) == len(wanted):
            for i, span in zip(wanted, spans, strict=True):
                self._check_calls(i, text[slice(*span)])
            ends = [self._words_end(i, span, text) for i, span in zip(wanted, spans, strict=True)]
        ends = [end for end, span in zip(ends, spans, strict=True) if span[1] > span[0]]
        spans = [span for span in spans if span[1] > span[0]]
        if first == 0:
            boundary = spans[0][0] if spans else len(text)
        elif first in self._said:
            boundary = self._start(first, text)
            if boundary < 0:
                boundary = self._turn_by_replacement(first, text)[0]
        else:
            boundary = common_prefix(self.render(first), text)
        other_start = bool(wanted) and self._has_other_start(wanted[-1], text)
        return Rendered(text, tuple(spans), boundary, tuple(ends), tuple(rewritten), other_start)

    def _rendered_roles(self, first: int, roles: tuple[str, ...]) -> Rendered:
        """Spans of the turns of `roles`; a turn other than the assistant's begins at its content."""
        text = self.render(len(self._messages))
        whole, own = self.rendered(0), {}
        rewritten = whole.rewritten if "assistant" in roles else ()
        kept = [i for i in self._scored if i not in rewritten]
        if len(kept) == len(whole.spans) and "assistant" in roles:
            own = dict(zip(kept, whole.spans, strict=True))
        turns = []
        for i in self._weighted:
            role = self._messages[i]["role"]
            if (
                i < first
                or role not in roles
                or i in rewritten
                or not (self._messages[i].get("content") or role == "assistant")
            ):
                continue
            span = own.get(i) or (self._turn(i, text) if role == "assistant" else self._words(i, text))
            turns.append((span, self._words_end(i, span, text)))
        turns = [(span, end) for span, end in turns if span[1] > span[0]]
        boundary = turns[0][0][0] if turns else len(text)
        spans, ends = tuple(span for span, _ in turns), tuple(end for _, end in turns)
        return Rendered(text, spans, boundary, ends, rewritten, whole.other_start)

    def _words(self, i: int, text: str) -> Span:
        """The span of message `i`'s content, of any role, with the end-of-turn text after it."""
        through = text if i == len(self._messages) - 1 else self.render_or_none(i + 1)
        replaced = [*self._messages[:i], {**self._messages[i], "content": _SENTINEL}]  # may occur in markers
        shown = self.render_or_none(i + 1, messages=replaced) or ""
        at = shown.find(_SENTINEL)
        if through is not None and text.startswith(through) and at >= 0 and through.startswith(shown[:at]):
            return at, len(through)
        return self._turn_by_replacement(i, text)

    def render(self, count: int, add_generation_prompt: bool = False, messages=None) -> str:
        """The text of the first `count` messages."""
        messages = (self._messages if messages is None else messages)[:count]
        if self._template.is_plain and self._template.plain is None:
            raise InputError(
                "messages, but the tokenizer has no chat template",
                "a template that turns messages into text",
                "--config.model.chat_template=FILE.jinja",
            )
        try:
            return self._render(messages, add_generation_prompt)
        except Exception as error:  # templates raise anything; the fault is theirs or the record's
            raise self._refused(messages, error) from error

    def render_or_none(self, count: int, add_generation_prompt: bool = False, messages=None) -> str | None:
        """The same, or None: a template may refuse the first part of a conversation."""
        key = count, add_generation_prompt
        if messages is None and key in self._parts:
            return self._parts[key]
        try:
            text = self._render((self._messages if messages is None else messages)[:count], add_generation_prompt)
        except Exception:
            text = None
        if messages is None:
            self._parts[key] = text
        return text

    def _render(self, messages, add_generation_prompt: bool) -> str:
        template = self._template
        if template.is_plain:
            assert template.plain is not None
            return template.plain(messages, add_generation_prompt)
        return template.tokenizer.apply_chat_template(
            messages,
            tools=self._given.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._given.values,
        )

    def _refused(self, messages, error) -> InputError:
        fix = "the record, or --config.model.chat_template=FILE.jinja"
        folded = with_system_turns(list(messages), "fold")
        if folded != messages and self.render_or_none(len(folded), messages=folded) is not None:
            fix = (
                "--config.data.system_turns=fold writes system turns into the user's, =drop leaves them out;"
                " or --config.model.chat_template=FILE.jinja"
            )
        roles = " ".join(str(m.get("role")) for m in messages)
        return InputError(
            f"the chat template refuses a conversation ({roles}): {error}",
            "messages that the template takes",
            fix,
        )

    def _marked(self) -> tuple[str, list[Span]] | None:
        """Text and spans by the template's `{% generation %}` blocks; None where it has none."""
        if self._template.is_plain:
            return None
        tokenizer = self._template.tokenizer
        source = tokenizer.get_chat_template(None, self._given.tools)
        if not _GENERATION_MARK.search(source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [self._messages],
                tools=self._given.tools,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **self._given.values},
            )
        except Exception as error:
            raise self._refused(self._messages, error) from error
        text, eos = texts[0], tokenizer.eos_token
        pieces: list[Span] = []
        found: Any = spans[0]  # transformers' annotation says str; it is a list of pairs of ints
        for start, end in found:
            if eos and not text[:end].endswith(eos) and text.startswith(eos, end):
                end += len(eos)  # the template leaves the end of turn out of the block
            pieces.append((start, end))
        return text, pieces

    def _marked_turns(self, pieces: list[Span], wanted: list[int], text: str) -> list[Span]:
        """The generation blocks of the wanted messages; a turn may have several."""
        if len(pieces) == len(self._said):
            return [pieces[self._said.index(i)] for i in wanted]
        turns = [self._turn(i, text) for i in wanted]
        return [p for p in pieces if any(start < p[1] and p[0] < end for start, end in turns)]

    def _check_calls(self, i: int, turn: str) -> None:
        """Refuses tool calls that the template does not render: an empty turn would be trained on."""
        calls = self._messages[i].get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in turn:
                raise InputError(
                    f"the tool call {name!r} of message {i} is not in the rendered text",
                    "a chat template that renders tool calls",
                    "--config.model.chat_template=FILE.jinja",
                )

    def _words_end(self, i: int, span: Span, text: str) -> int:
        """The end of message `i`'s content in its span; the span's end if the template changed the content."""
        words = str(self._messages[i].get("content") or "").strip()
        at = text.find(words, *span) if words else -1
        return span[1] if at < 0 else at + len(words)

    def _start(self, i: int, text: str) -> int:
        """Where the content of assistant message `i` begins in `text`; -1 if prefixes do not tell."""
        before = self.render_or_none(i) if i else None
        opened = self.render_or_none(i, True) if i else None
        if before is None or opened is None or not text.startswith(before):
            return -1
        start = common_prefix(opened, text)
        return max(len(before), start if start == len(opened) else outside_marker(text, start))

    def _turn(self, i: int, text: str) -> Span:
        start = self._start(i, text)
        through = text if i == len(self._messages) - 1 else self.render_or_none(i + 1)
        if through is not None and 0 <= start <= len(through) and text.startswith(through):
            span = start, len(through)
        else:
            span = self._turn_by_replacement(i, text)
            span = (start if 0 <= start < span[0] else span[0]), span[1]
        return self._without_empty_thoughts(i, span, text)

    def _without_empty_thoughts(self, i: int, span: Span, text: str) -> Span:
        """A turn without the markers that the template writes before the words of a message without thoughts."""
        start, end = span
        if after_markers(text, start, end) == start or has_thoughts(self._messages[i]):
            return span
        shown = self.render_or_none(len(self._messages), messages=self._replaced(i))
        if shown is None or _SENTINEL not in shown:
            return span
        words = common_prefix(text, shown)
        return after_markers(text, start, max(start, min(words, end))), end

    def _is_rewritten(self, i: int, span: Span, text: str) -> bool:
        """Whether the template writes turn `i` in other words than where it is the last, as it is when it is said."""
        through = text if i == len(self._messages) - 1 else self.render_or_none(i + 1)
        if through is None or text.startswith(through):
            return False
        alone = Conversation(self._template, self._messages[: i + 1], self._given)
        alone._parts = self._parts
        try:
            said = alone._turn(i, through)
        except InputError:
            return False
        here = text[span[0] : self._words_end(i, span, text)].strip()
        there = through[said[0] : alone._words_end(i, said, through)].strip()
        return bool(here) != bool(there) or not (here.startswith(there) or there.startswith(here))

    def _has_other_start(self, i: int, text: str) -> bool:
        """Whether turn `i` begins otherwise than the generation prompt has it, but for white space."""
        before, opened = (self.render_or_none(i, prompt) for prompt in (False, True)) if i else (None, None)
        if before is None or opened is None or not text.startswith(before):
            return False
        return not text.startswith(opened.rstrip())

    def _replaced(self, i: int) -> list[Message]:
        """The messages, the words and thoughts of message `i` replaced by what is in no other."""
        own = self._messages[i]
        replaced = {**own, "content": _SENTINEL} | {key: _SENTINEL for key in KEYS if isinstance(own.get(key), str)}
        return [*self._messages[:i], replaced, *self._messages[i + 1 :]]

    def _turn_by_replacement(self, i: int, text: str) -> Span:
        replaced = self._replaced(i)
        other = self.render(len(replaced), messages=replaced)
        if _SENTINEL not in other:
            raise InputError(
                f"the chat template leaves out message {i} ({replaced[i]['role']}:"
                f" {str(self._messages[i].get('content'))[:60]!r})",
                "a template that renders every message that is trained on",
                "--config.model.chat_template=FILE.jinja",
            )
        start = common_prefix(text, other)
        opened = self.render_or_none(i, True) or ""
        if has_thoughts(self._messages[i]) and not opened.endswith(text[before_marker(text, start) : start]):
            start = before_marker(text, start)
        end = len(text) - common_prefix(text[start:][::-1], other[start:][::-1])
        alone = self._end_of_turn(i, replaced)
        shared = common_prefix(text[end:], alone)
        end = end + shared if shared == len(alone) else max(end, outside_marker(text, end + shared))
        return start, end

    def _end_of_turn(self, i: int, replaced: list[Message]) -> str:
        """The text that the template writes right after the content of message `i`."""
        alone = self.render_or_none(i + 1, messages=replaced)
        if alone is None and i in self._said and self._said[-1] == len(replaced) - 1:  # then as behind the last message
            last = [*self._messages[:-1], {**self._messages[-1], "content": _SENTINEL}]
            alone = self.render_or_none(len(last), messages=last)
        if alone is not None and _SENTINEL in alone:
            return alone[alone.rindex(_SENTINEL) + 1 :]
        return self._template.tokenizer.eos_token or ""
