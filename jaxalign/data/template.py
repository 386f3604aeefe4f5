"""Chat templates: messages to text, and the spans of assistant turns in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxalign.data.omissions import left_out, split_markers, with_system_turns
from jaxalign.data.records import Message
from jaxalign.data.template_inputs import COLUMN, TemplateInputs, unread
from jaxalign.errors import InputError

Span = tuple[int, int]  # half-open range of characters

_SENTINEL = "\ue000"  # a private-use character: no real message begins or ends with it
_NOTHING = TemplateInputs()
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # scored turns, with their end-of-turn text, in order
    boundary: int  # character at which the prompt ends
    words_end: tuple[int, ...] = ()  # end of the message's content in each span; the span's end if unknown


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


class ChatTemplate:
    """A tokenizer's chat template, or a plain renderer where it has none.

    Args:
      tokenizer: a `transformers` tokenizer.
      plain: `(messages, add_generation_prompt) -> text`, used where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer, plain: Callable[[list[Message], bool], str] | None = None):
        self._tokenizer = tokenizer
        self._plain = plain
        self.source: str | dict | None = getattr(tokenizer, "chat_template", None)
        self.writes_calls = "tool_calls" in str(self.source)

    @property
    def is_plain(self) -> bool:
        """Whether conversations are rendered without a chat template."""
        return not self.source

    def prompt(self, messages: Sequence[Message], given: TemplateInputs = _NOTHING) -> str:
        """The prompt's text, with the header of the assistant's turn.

        Args:
          messages: of the prompt.
          given: what else the template gets.

        Raises:
          InputError: where the template refuses the conversation.
        """
        return _with_calls(self, messages, lambda said: _Conversation(self, said, given).render(len(said), True))

    def left_out(
        self, messages: Sequence[Message], text: str, given: TemplateInputs = _NOTHING, *, prompt: bool = False
    ) -> tuple[str, ...]:
        """The parts of a conversation that are not in its rendered text, by the names that the report counts.

        Args:
          messages: the whole conversation.
          text: as `conversation` or, with `prompt`, `prompt` rendered it.
          given: what else the template got.
          prompt: whether the text opens the assistant's turn at its end.
        """
        if self.is_plain:
            return ("tools",) * bool(given.tools) + (COLUMN,) * bool(given.values)
        bare = [m for m in messages if "function_call" in m]
        lost = left_out([m for m in messages if "function_call" not in m], text)
        if bare and not (self.writes_calls and _rendered_calls(self, messages, text, given, prompt)):
            lost += ("the tags of function calls (written as their JSON)",)
        if given.tools and not _shows(given.tools, text):

            def without(said: Sequence[Message]) -> str:
                return _Conversation(self, said, given._replace(tools=None)).render(len(said), prompt)

            lost += ("tools",) if _with_calls(self, messages, without) == text else ()
        return lost + tuple(f"{COLUMN} {name}" for name in unread(self.source, given.values))

    def split_markers(self) -> dict[str, int]:
        """The template's markers that are several tokens for this tokenizer, with the number of tokens."""
        if self.is_plain:
            return {}
        said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        text = _Conversation(self, said, _NOTHING).render_or_none(2)
        return split_markers(str(self.source) if text is None else text, self._tokenizer)

    def conversation(
        self,
        messages: Sequence[Message],
        first: int = 0,
        given: TemplateInputs = _NOTHING,
        *,
        roles: tuple[str, ...] = ("assistant",),
    ) -> Rendered:
        """Renders a conversation and finds the turns of the assistant, or of `roles`, from message `first` on.

        Generation marks in the template are followed.  Without them a turn is what `messages[:i + 1]` adds to
        `messages[:i]` with the generation prompt, where both really are prefixes of the whole.  Templates that
        rewrite earlier turns fail that test; there a turn is what changes in the whole text when its content
        is replaced, and the end-of-turn text that follows.

        Args:
          messages: the whole conversation; a message with `"weight": 0` is not among the spans.
          first: messages before this index are the prompt, whoever speaks.
          given: what else the template gets.
          roles: whose turns are the spans.

        Returns:
          The text, the assistant's spans, and the boundary of the prompt: the start of message `first`, or of the
          first span where `first` is 0.

        Raises:
          InputError: where the template refuses the conversation or leaves a message out.
        """
        return _with_calls(self, messages, lambda said: _Conversation(self, said, given).rendered(first, roles))


def _with_calls(template: ChatTemplate, messages: Sequence[Message], render: Callable[[Sequence[Message]], Any]) -> Any:
    """Renders function calls as the template's tool calls, or as JSON where it has none."""
    if not any("function_call" in message for message in messages):
        return render(messages)
    bare = [{k: v for k, v in message.items() if k != "function_call"} for message in messages]
    if template.writes_calls and not template.is_plain:
        calls = [
            {**said, "content": "", "tool_calls": message["function_call"]} if "function_call" in message else said
            for said, message in zip(bare, messages, strict=True)
        ]
        try:
            return render(calls)
        except InputError:
            pass
    return render(bare)


def _rendered_calls(
    template: ChatTemplate, messages: Sequence[Message], text: str, given: TemplateInputs, prompt: bool
) -> bool:
    """Whether the template renders tool calls: the text differs from that with their JSON."""
    bare = [{k: v for k, v in message.items() if k != "function_call"} for message in messages]
    return _Conversation(template, bare, given).render_or_none(len(bare), prompt) != text


def _shows(tools: list, text: str) -> bool:
    """Whether a text contains the description of every tool."""
    described = [tool.get("function", tool) for tool in tools]
    words = [tool.get("description") for tool in described if isinstance(tool, dict)]
    return len(words) == len(tools) and all(isinstance(said, str) and said and said in text for said in words)


class _Conversation:
    """One conversation under one template."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], given: TemplateInputs):
        self._template, self._given = template, given
        self._messages = [{k: v for k, v in m.items() if v is not None and k != "weight"} for m in messages]
        self._said = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        self._weighted = [i for i, m in enumerate(messages) if m.get("weight") != 0]
        self._scored = [i for i in self._said if i in self._weighted]

    def rendered(self, first: int, roles: tuple[str, ...] = ("assistant",)) -> Rendered:
        if roles != ("assistant",):
            return self._rendered_roles(first, roles)
        wanted = [i for i in self._scored if i >= first]
        marked = self._marked()
        if marked is None:
            text = self.render(len(self._messages))
            spans = [self._turn(i, text) for i in wanted]
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
        return Rendered(text, tuple(spans), boundary, tuple(ends))

    def _rendered_roles(self, first: int, roles: tuple[str, ...]) -> Rendered:
        """Spans of the turns of `roles`; a turn other than the assistant's begins at its content."""
        text = self.render(len(self._messages))
        own = {i: span for i, span in zip(self._scored, self.rendered(0).spans, strict=False)}
        if len(own) != len(self._scored) or "assistant" not in roles:
            own = {}
        turns = []
        for i in self._weighted:
            role = self._messages[i]["role"]
            if i < first or role not in roles or not (self._messages[i].get("content") or role == "assistant"):
                continue
            span = own.get(i) or (self._turn(i, text) if role == "assistant" else self._words(i, text))
            turns.append((span, self._words_end(i, span, text)))
        turns = [(span, end) for span, end in turns if span[1] > span[0]]
        boundary = turns[0][0][0] if turns else len(text)
        return Rendered(text, tuple(span for span, _ in turns), boundary, tuple(end for _, end in turns))

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
        if self._template.is_plain and self._template._plain is None:
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
        try:
            return self._render((self._messages if messages is None else messages)[:count], add_generation_prompt)
        except Exception:
            return None

    def _render(self, messages, add_generation_prompt: bool) -> str:
        template = self._template
        if template.is_plain:
            assert template._plain is not None
            return template._plain(messages, add_generation_prompt)
        return template._tokenizer.apply_chat_template(
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
        tokenizer = self._template._tokenizer
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
        return max(len(before), common_prefix(opened, text))

    def _turn(self, i: int, text: str) -> Span:
        start = self._start(i, text)
        through = text if i == len(self._messages) - 1 else self.render_or_none(i + 1)
        if through is not None and 0 <= start <= len(through) and text.startswith(through):
            return start, len(through)
        return self._turn_by_replacement(i, text)

    def _turn_by_replacement(self, i: int, text: str) -> Span:
        replaced = list(self._messages)
        replaced[i] = {**replaced[i], "content": _SENTINEL}
        other = self.render(len(replaced), messages=replaced)
        if _SENTINEL not in other:
            raise InputError(
                f"the chat template leaves out message {i} ({replaced[i]['role']}:"
                f" {str(self._messages[i].get('content'))[:60]!r})",
                "a template that renders every message that is trained on",
                "--config.model.chat_template=FILE.jinja",
            )
        start = common_prefix(text, other)
        end = len(text) - common_prefix(text[start:][::-1], other[start:][::-1])
        end += common_prefix(text[end:], self._end_of_turn(i, replaced))
        return start, end

    def _end_of_turn(self, i: int, replaced: list[Message]) -> str:
        """The text that the template writes right after the content of message `i`."""
        alone = self.render_or_none(i + 1, messages=replaced)
        if alone is None and i in self._said and self._said[-1] == len(replaced) - 1:  # then as behind the last message
            last = [*self._messages[:-1], {**self._messages[-1], "content": _SENTINEL}]
            alone = self.render_or_none(len(last), messages=last)
        if alone is not None and _SENTINEL in alone:
            return alone[alone.rindex(_SENTINEL) + 1 :]
        return self._template._tokenizer.eos_token or ""
