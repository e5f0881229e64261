"""What finds one kind of thing: an expression that proposes, and a check that decides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gazelle.guard.patterns import compile_re2

DIGITS = tuple("0123456789")
# (start, end, score) of what is really there.
Span = tuple[int, int, float]


class Candidate:
    """A proposed span, with what stands around it."""

    def __init__(self, text: str, match: Any) -> None:
        self.text, self.match = text, match
        self.start, self.end = match.span()

    @property
    def found(self) -> str:
        """The span's text."""
        return self.text[self.start:self.end]

    def before(self, length: int = 32) -> str:
        """What stands before it on the same line, in lower case."""
        return self.text[max(0, self.start - length):self.start].rpartition("\n")[2].lower()

    def alone(self, glue: str = "") -> bool:
        """True unless ASCII letters, digits or one of `glue` go on at either end: no longer word is cut."""
        sides = self.text[max(0, self.start - 1):self.start], self.text[self.end:self.end + 1]
        return not any(side and ((side.isascii() and side.isalnum()) or side in glue) for side in sides)


class Words:
    """Words that say what stands behind them, found in time that does not grow with their number."""

    def __init__(self, *expressions: str) -> None:
        self._expression = "(?s).*(?:" + "|".join(expressions) + ")"

    @cached_property
    def _compiled(self) -> Any:
        return compile_re2(self._expression)

    def last(self, before: str) -> int:
        """Where the last of them ends in `before`, -1 if there is none."""
        found = self._compiled.match(before)
        return -1 if found is None else int(found.end())


def named(before: str, own: Words, others: Words) -> bool | None:
    """True if the words before something name its kind, False if they name another kind, None if they name none."""
    if not before:
        return None
    mine, other = own.last(before), others.last(before)
    return None if mine == other == -1 else mine > other


@dataclass(frozen=True)
class Detector:
    """One kind, or several that are told apart by the check.

    Attributes:
        kinds: what it may find -> the reason that findings give.
        expression: RE2's; it proposes spans of bounded length, or ones that end where a run of its characters ends.
        check: kind and span of each thing in a candidate; None takes every candidate as the first kind, with score 1.
        needs: strings one of which every match has: a text without them is not searched.
        spelt: look where letters that are spelt apart have been put together, too.
    """

    group: str
    kinds: dict[str, str]
    expression: str
    check: Callable[[Candidate], Iterator[tuple[str, Span]]] | None = None
    needs: tuple[str, ...] = ()
    spelt: bool = False

    @cached_property
    def compiled(self) -> Any:
        """The expression, compiled when it is first used."""
        return compile_re2(self.expression)

    def search(self, text: str, position: int = 0) -> Iterator[tuple[str, Span]]:
        """Kind and span of everything that is found in a folded text from `position` on."""
        for match in self.compiled.finditer(text, position):
            start, end = match.span()
            if self.check is None:
                yield next(iter(self.kinds)), (start, end, 1.0)
                continue
            yield from self.check(Candidate(text, match))
