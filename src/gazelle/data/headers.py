"""Which characters of a text that was rendered already the assistant writes: those behind a header of its turns.

Only rows that came as texts need this. Of a row whose turns lie beside its text, and render to it, the spans are those
of `data.spans`: a user may write "<|im_start|>assistant" too, and headers alone cannot tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gazelle.base.errors import OptionError
from gazelle.data.conversation import Conversation, Turn
from gazelle.data.spans import Renderer

_MARKS = "\ue000first\ue000", "\ue000answer\ue000", "\ue000second\ue000"


@dataclass(frozen=True)
class Headers:
    """What stands before a question and before an answer, such as "<|im_start|>user\\n"."""

    instruction: str
    response: str

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of each answer: from behind its header to the next question or the end."""
        found = []
        at = text.find(self.response)
        while at >= 0:
            start = at + len(self.response)
            following = text.find(self.instruction, start) if self.instruction else -1
            end = len(text) if following < 0 else following
            found.append((start, end))
            at = text.find(self.response, end)
        return found


def template_headers(tokenizer: Any) -> Headers:
    """The headers that a tokenizer's own chat template writes.

    Raises:
        OptionError: it writes none that could be told from the rest.
    """
    renderer = Renderer(tokenizer)
    first, answer, second = _MARKS
    row = Conversation((Turn("user", first), Turn("assistant", answer), Turn("user", second)), "chat template")
    text, _ = renderer.render(row)
    before_answer, _, after = text.partition(answer)
    closing = renderer.closing.strip()  # what closes a turn belongs to that turn

    def header(between: str) -> str:
        return between.lstrip().removeprefix(closing).lstrip("\n")

    response, instruction = header(before_answer.partition(first)[2]), header(after.partition(second)[0])
    if not response.strip() or not instruction.strip():
        raise OptionError("the chat template has no headers to tell answers by", where="train_on_responses_only",
                          found=repr(text), expected="a text before every question, and one before every answer",
                          fix="pass instruction_part= and response_part=")
    return Headers(instruction, response)


class ResponseSpans:
    """The answers in rows that are texts.

    Args:
        headers: to tell answers by.
        tokenizer: whose chat template may have made the texts.
        chats: the turns that lie beside a text, by where the row was read.
    """

    def __init__(self, headers: Headers, tokenizer: Any, chats: Mapping[str, Conversation] | None = None) -> None:
        self.headers, self.chats = headers, chats or {}
        self.renderer = Renderer(tokenizer) if tokenizer.chat_template else None
        self.special = tuple({*tokenizer.all_special_tokens, *(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special)})
        self.exact = 0  # rows whose spans come from their turns

    def __call__(self, row: Conversation) -> list[tuple[int, int]]:
        """Characters [start, end) of the answers in `row.text`, through the token that ends each."""
        text = row.text or ""
        chat = self.chats.get(row.where)
        if chat is not None and self.renderer is not None:
            rendered, spans = self.renderer.render(chat)
            if (offset := text.find(rendered)) >= 0 and not text.replace(rendered, "", 1).strip():
                self.exact += 1
                return [(span.start + offset, span.end + offset) for span in spans]
        return [(start, self._closed(text, start, end)) for start, end in self.headers.spans(text)]

    def _closed(self, text: str, start: int, end: int) -> int:
        """White space behind the token that ends an answer is the template's, not the answer's."""
        kept = start + len(text[start:end].rstrip())
        return kept if text.endswith(self.special, start, kept) else end
