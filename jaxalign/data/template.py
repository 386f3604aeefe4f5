"""Chat templates: messages to text, and the spans of assistant turns in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxalign.data.omissions import left_out, split_markers
from jaxalign.data.records import Message
from jaxalign.data.template_inputs import COLUMN, TemplateInputs, unread
from jaxalign.data.thoughts import keys_read, thoughts_of
from jaxalign.data.turns import Conversation, Rendered, Renderer
from jaxalign.errors import InputError

_NOTHING = TemplateInputs()


class ChatTemplate:
    """A tokenizer's chat template, or a plain renderer where it has none.

    Args:
      tokenizer: a `transformers` tokenizer.
      plain: `(messages, add_generation_prompt) -> text`, used where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer, plain: Callable[[list[Message], bool], str] | None = None):
        self._tokenizer = tokenizer
        self.source: str | dict | None = getattr(tokenizer, "chat_template", None)
        self.writes_calls = "tool_calls" in str(self.source)
        self.thoughts_keys = keys_read(self.source)
        self.renderer = Renderer(tokenizer, plain, self.is_plain, self.thoughts_keys)

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
        return _with_calls(
            self, messages, lambda said: Conversation(self.renderer, said, given).render(len(said), True)
        )

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
            thoughts = [t for t in map(thoughts_of, messages) if t not in text]
            return ("tools",) * bool(given.tools) + ("reasoning",) * bool(thoughts) + (COLUMN,) * bool(given.values)
        bare = [m for m in messages if "function_call" in m]
        lost = left_out([m for m in messages if "function_call" not in m], text)
        if bare and not (self.writes_calls and _rendered_calls(self, messages, text, given, prompt)):
            lost += ("the tags of function calls (written as their JSON)",)
        if given.tools and not _shows(given.tools, text):

            def without(said: Sequence[Message]) -> str:
                return Conversation(self.renderer, said, given._replace(tools=None)).render(len(said), prompt)

            lost += ("tools",) if _with_calls(self, messages, without) == text else ()
        return lost + tuple(f"{COLUMN} {name}" for name in unread(self.source, given.values))

    def split_markers(self) -> dict[str, int]:
        """The template's markers that are several tokens for this tokenizer, with the number of tokens."""
        if self.is_plain:
            return {}
        said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        text = Conversation(self.renderer, said, _NOTHING).render_or_none(2)
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
        is replaced, and the end-of-turn text that follows.  Markers of thoughts that the template writes around
        none are not in a turn, and a turn that it writes in other words than where it is the last is none.

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
        return _with_calls(self, messages, lambda said: Conversation(self.renderer, said, given).rendered(first, roles))


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
    return Conversation(template.renderer, bare, given).render_or_none(len(bare), prompt) != text


def _shows(tools: list, text: str) -> bool:
    """Whether a text contains the description of every tool."""
    described = [tool.get("function", tool) for tool in tools]
    words = [tool.get("description") for tool in described if isinstance(tool, dict)]
    return len(words) == len(tools) and all(isinstance(said, str) and said and said in text for said in words)
