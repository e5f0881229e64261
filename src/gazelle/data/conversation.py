"""The one form every data set is brought to before it is rendered and tokenised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        extra: what else the chat template may look at: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, ...
        train: False for an assistant turn that is only context, such as one inside a prompt or of weight 0.
    """

    role: Role
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True

    @property
    def labelled(self) -> bool:
        """True if the model is to learn to write this turn."""
        return self.role == "assistant" and self.train


@dataclass(frozen=True)
class Conversation:
    """One row: turns for a chat template, or `text` as it stands (then `turns` is empty).

    Attributes:
        where: the file and line, or row, it was read from; error messages show it.
        tools: JSON schemas of the functions the assistant may call.
    """

    turns: tuple[Turn, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The turns as `tokenizer.apply_chat_template` takes them."""
        return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in self.turns]
