"""One prompt on its way to an answer, and what happens to it."""

import itertools
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gazelle.generate.options import Sampling
from gazelle.generate.sample import Chooser, Logprob

if TYPE_CHECKING:
    from gazelle.generate.text import Pieces

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """A prompt, its answer so far, and where its keys and values lie.

    Attributes:
        prompt: ids.
        sampling: how the answer is chosen.
        adapter: None for the model as it stands, `adapters.mixed.BASE` for no adapter, or a name.
        limit: tokens the answer may have.
        tokens: the answer so far, with the token that ended it.
        text: what of the answer has been handed out.
        finish_reason: None while it goes on; "stop", "length", "cancelled" or "error".
        reused: tokens of the prompt that were in the cache already.
        created: when it was submitted, by time.monotonic().
        pages: its pages of the cache; `computed` tokens are in them, the first `registered` pages are known to be full.
        before: what its next full page comes after (`pages.Pages.match`).
    """

    prompt: list[int]
    sampling: Sampling
    adapter: str | None
    limit: int
    chooser: Chooser
    pieces: "Pieces"
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    reused: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    created: float = field(default_factory=time.monotonic)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    registered: int = 0
    before: Hashable = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def text(self) -> str:
        """What of the answer has been handed out."""
        return self.pieces.text

    def ids(self, start: int, stop: int) -> Sequence[int]:
        """The tokens from `start` to `stop` of prompt and answer."""
        edge = len(self.prompt)
        if stop <= edge:
            return self.prompt[start:stop]
        return [*self.prompt[start:], *self.tokens[max(start - edge, 0):stop - edge]]


@dataclass(frozen=True)
class Event:
    """What a step did for one request.

    Attributes:
        request: which.
        tokens: those that came.
        text: what may be shown of the answer now; never part of a character or of a stop string.
        finish_reason: "stop", "length", "cancelled" or "error" if it was the last event of this request.
        logprobs: one for each of `tokens`, if they were asked for.
        error: what went wrong, if the reason is "error".
    """

    request: Request
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    error: Exception | None = None
