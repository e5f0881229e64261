"""What the server needs of whatever writes the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gazelle.generate.options import Sampling


@dataclass(frozen=True)
class Token:
    """A token of an answer with its natural-log probability, and the likeliest in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: that may be shown; text that could be the beginning of a stop string comes later.
        ids: of tokens since the last piece.
        tokens: the same with probabilities, if those were asked for.
        finish: "stop" or "length" with the last piece.
    """

    text: str
    ids: tuple[int, ...] = ()
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


Sink = Callable[[Piece | BaseException], None]


class Engine(Protocol):
    """Writes answers in a thread of its own."""

    @property
    def running(self) -> int:
        """Answers being written."""

    @property
    def waiting(self) -> int:
        """Answers that wait."""

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread."""

    def submit(self, ids: Sequence[int], sampling: Sampling, adapter: str | None, sink: Sink) -> Any:
        """Ask for an answer; `sink` is called from the engine's thread. Returns what `cancel` takes.

        Raises:
            UserError: it cannot be answered.
        """

    def cancel(self, handle: Any) -> None:
        """Stop writing an answer. Nothing comes of it any more, soon."""

    def stop(self) -> None:
        """End the thread and wait for it."""
