"""What finds one kind of thing: an expression that proposes, and a check that decides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gazelle.guard.patterns import compile_re2

# (start, end, score) of what is really there.
Span = tuple[int, int, float]


@dataclass(frozen=True)
class Candidate:
    """A proposed span, with what stands around it."""

    text: str
    start: int
    end: int
    groups: tuple[str | None, ...]
    spans: tuple[tuple[int, int], ...]

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
        return not any(side and (side.isascii() and side.isalnum() or side in glue) for side in sides)


@dataclass(frozen=True)
class Detector:
    """One kind, or several that are told apart by the check.

    Attributes:
        kinds: what it may find -> the reason that findings give.
        expression: RE2's; it proposes spans of bounded length, or ones that end where a run of its characters ends.
        check: kind and span of each thing in a candidate; None takes every candidate as the first kind, with score 1.
        needs: characters one of which every match has, in lower case: a text without them is not searched.
    """

    group: str
    kinds: dict[str, str]
    expression: str
    check: Callable[[Candidate], Iterator[tuple[str, Span]]] | None = None
    needs: tuple[str, ...] = ()

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
            spans = tuple(match.span(number) for number in range(self.compiled.groups + 1))
            yield from self.check(Candidate(text, start, end, (match.group(), *match.groups()), spans))
