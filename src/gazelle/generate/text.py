"""An answer's text, piece by piece: no broken characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pieces:
    """Turns tokens into text that may be shown.

    Text is held back while a character is incomplete, and while it may be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.

    Attributes:
        text: all that was handed out.
        stopped: a stop string came; its beginning is the end of the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0  # tokens before `_read` are in the text; those from `_begin` give it its context
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin:self._read])
        now = self._decode(self._ids[self._begin:])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._hand_out(now[len(before):])

    def end(self) -> str:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin:self._read])
        now = self._decode(self._ids[self._begin:])
        piece = self._hand_out(now[len(before):])
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _hand_out(self, new: str) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            piece, self._held, self.stopped = self._held[:min(found)], "", True
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:length])), 0)
