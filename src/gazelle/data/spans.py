"""Which characters of a rendered conversation the assistant writes.

The conversation is rendered once in full. A turn's span runs from where inference would hand over to the model (the
messages before it, rendered with the generation prompt) to the token that ends the turn. Both points come from
rendering parts of the conversation and demanding that they are prefixes of the whole, never from searching the text
for headers: a user may write "<|im_start|>assistant" too.

Some templates render a turn differently once others follow it (Qwen3 drops earlier reasoning, Mistral v0.3 moves the
system prompt to the last question), so that a part is no prefix. Then the whole is rendered again with the turn's text
exchanged for a mark; what both renderings share at the start and at the end brackets the turn.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jinja2

from gazelle.base.errors import DataError, ModelError
from gazelle.data.conversation import Conversation, Turn

_MARK = "\ue000mark\ue000"  # private-use characters, so that it shares neither end with a real text


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model is to write, after `prompt`.

    Attributes:
        closed: a special token ends them.
        whole: they hold all of the turn's content, up to white space.
    """

    start: int
    end: int
    prompt: str
    closed: bool
    whole: bool = True


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template", where="tokenizer", found="chat_template is empty",
                             expected="a template that renders messages", fix='choose one: chat_template="chatml"')
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of its labelled turns, in order.

        Raises:
            DataError: the template refuses the conversation, or renders a turn so that its end cannot be told.
        """
        messages = conversation.messages()
        text = self._render(messages, conversation)
        spans = [self._span(messages, number, text, conversation)
                 for number, turn in enumerate(conversation.turns) if turn.labelled]
        return text, spans

    @functools.cached_property
    def special(self) -> tuple[str, ...]:
        """The special tokens of the tokenizer."""
        return tuple({*self.tokenizer.all_special_tokens, *(
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)})

    @functools.cached_property
    def after(self) -> str:
        """What the template writes after the last answer."""
        row = Conversation((Turn("user", "a"), Turn("assistant", _MARK)), "chat template")
        text = self._render(row.messages(), row)
        if _MARK not in text:
            raise _unclear("the chat template leaves out what the assistant says", row, text, "every message")
        return text.partition(_MARK)[2]

    @functools.cached_property
    def closing(self) -> str:
        """`after` through its first special token; "" if there is none."""
        ends = [(self.after.index(token), -len(token)) for token in self.special if token in self.after]
        return self.after[: min(ends)[0] - min(ends)[1]] if ends else ""

    def _span(self, messages: list[dict[str, Any]], number: int, text: str, row: Conversation) -> Span:
        prompt = self._render(messages[:number], row, generation=True) if number else ""
        whole = text if number == len(messages) - 1 else self._render(messages[: number + 1], row)
        starts, ends = bool(prompt) and text.startswith(prompt), text.startswith(whole)
        start, end = len(prompt), len(whole)
        if not (starts and ends):
            content_start, content_end = self._bracket(messages, number, text, prompt, row)
            start = start if starts else content_start
            end = end if ends else self._close(text, content_end, row)
        if self.closing and text.endswith(self.after, start, end):
            end -= len(self.after) - len(self.closing)
        else:  # Tool calls may close with another token; then all is kept but the line breaks between turns.
            end = start + len(text[start:end].rstrip())
        written = text[start:end].removesuffix(self.closing)
        calls = [call["function"]["name"] for call in messages[number].get("tool_calls", ())]
        if not written.strip() or not all(name in written for name in calls):
            raise _unclear("the chat template leaves out this answer" + " or its tool calls" * bool(calls), row,
                           written or "nothing", "all that the assistant says")
        content = messages[number]["content"]
        return Span(start, end, prompt, closed=text.endswith(self.special, start, end),
                    whole=content in written or "".join(content.split()) in "".join(written.split()))

    def _bracket(self, messages: list[dict[str, Any]], number: int, text: str, prompt: str,
                 row: Conversation) -> tuple[int, int]:
        """Start and end of one turn's content, by rendering with a mark in its place."""
        marked = {"role": "assistant", "content": _MARK}
        other = self._render([*messages[:number], marked, *messages[number + 1 :]], row)
        start, tail = _shared(text, other), _shared(text[::-1], other[::-1])
        if other[start : len(other) - tail] != _MARK:
            raise _unclear("the chat template mixes this answer with other messages", row, text[-60:],
                           "every message once, in one place")
        # What the model writes before the content, such as the space in "[/INST] answer", is its own too.
        short = self._render([*messages[:number], marked], row)
        lead = short[len(prompt) : short.rindex(_MARK)] if prompt and short.startswith(prompt) else ""
        return start - len(lead) * text.endswith(lead, 0, start), len(text) - tail

    def _close(self, text: str, content_end: int, row: Conversation) -> int:
        if not text.startswith(self.closing, content_end):
            raise _unclear("the chat template ends this answer unlike the last one", row,
                           text[content_end : content_end + 40], f"{self.closing!r} after every answer")
        return content_end + len(self.closing)

    def _render(self, messages: list[dict[str, Any]], row: Conversation, generation: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=list(row.tools) or None, tokenize=False,
                                                      add_generation_prompt=generation)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError("the chat template refuses this conversation", where=row.where,
                            found=f"{error} (roles: {roles})", expected="roles and fields that the template knows",
                            fix="change the row, or choose another template with chat_template=") from error


def _shared(left: str, right: str) -> int:
    """How many characters two texts share at the start."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # halving, so that whole slices are compared and not characters
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _unclear(what: str, row: Conversation, found: str, expected: str) -> DataError:
    return DataError(what, where=row.where, found=repr(found), expected=expected,
                     fix="choose another template with chat_template=, or split the row into one answer a row")
