"""A text that comes in pieces, and leaves as soon as nothing in it can turn out to be unsafe."""

import re
from typing import TYPE_CHECKING

from gazelle.base.errors import OptionError
from gazelle.guard.findings import Finding, Verdict, masked, settle
from gazelle.guard.views import View, fold

if TYPE_CHECKING:
    from gazelle.guard.checker import SafetyChecker

# All in characters that can be seen: any number of invisible ones may stand between them.
CONTEXT = 160  # what has left and is looked at once more, for the words before a number
STEP = 24      # new text between two looks
AFTER = 4      # what stands behind a finding decides on it too
# Read backwards from the end: a word, address or key, or digits with gaps, that may go on with the next piece.
_OPEN = re.compile(r"[!-~]{1,600}|[0-9 .()_\-+]{1,4000}")


class GuardStream:
    """Pieces go in, what may leave comes out; joined, it is what `filter` makes of the whole text.

    Text leaves at a distance behind what has come, masked where it is to be masked; a word, number or finding that is
    not finished waits as a whole. From a blocked span on nothing leaves (`hold_back` of the checker says how far apart
    the two ends of a block pattern's match may be). With a classifier everything waits for
    `finish`, since it judges whole texts.

    Attributes:
        blocked: True from the moment that something blocks the text: there is no use in making more of it.
        verdict: the verdict on the whole text, after `finish`.
    """

    def __init__(self, checker: "SafetyChecker") -> None:
        self._checker = checker
        self._pieces: list[str] = []
        self._window = ""  # the end of the text: context that has left, then all that waits
        self._left = 0     # how much of the window has left
        self._gone = 0     # how much of the text stands before the window
        self._begun = False  # the window's first character is context; else nothing that can be seen stands before it
        self._unseen = 0
        self.blocked = False
        self.verdict: Verdict | None = None

    def feed(self, piece: str) -> str:
        """Take a piece of any length; returns what may leave now, often nothing."""
        if self.verdict is not None:
            raise OptionError("the stream has been finished", where="feed", found="a piece after finish()",
                              expected="a new stream for another text", fix="call checker.stream() again")
        self._pieces.append(piece)
        if self.blocked or self._checker.classifier is not None:
            return ""
        self._window += piece
        self._unseen += len(piece)
        # What waits in one long piece is looked at more seldom, so that the work stays in proportion to the text.
        if self._unseen < max(STEP, (len(self._window) - self._left) // 16):
            return ""
        self._unseen = 0
        return self._leave()

    def finish(self) -> str:
        """The end of the text: returns the rest, or the refusal if the text is blocked. Sets `verdict`."""
        if self.verdict is not None:
            return ""
        whole = "".join(self._pieces)
        self.verdict = self._checker.check(whole)
        self.blocked = not self.verdict.allowed
        if self.blocked:
            return self._checker.refusal
        return masked(whole, self.verdict.findings, self._gone + self._left)

    def _leave(self) -> str:
        folded = fold(self._window)
        findings = settle(self._checker.scan(self._window, folded, 1 if self._begun else 0))
        limit = self._limit(folded, findings)
        for found in findings:
            if found.action == "block" and found.end > self._left and found.start < limit:
                limit, self.blocked = max(found.start, self._left), True
                break
        if limit <= self._left:
            return ""
        leaving = masked(self._window, findings, self._left, limit)
        seen = len(folded.text) if folded.offsets is None else int(folded.offsets.searchsorted(limit))
        first = max(0, min(seen, limit) - CONTEXT)
        self._begun |= first > 0
        context = folded.origin(first)
        self._window, self._left, self._gone = self._window[context:], limit - context, self._gone + context
        return leaving

    def _limit(self, folded: View, findings: tuple[Finding, ...]) -> int:
        """Where what has to wait begins: a character of the window."""
        size = len(folded.text)
        waits = size - self._checker.hold_back
        tail = _OPEN.match(folded.text[:-4001:-1])
        waits = min(waits, size - tail.end()) if tail else waits
        limit = folded.origin(max(0, waits))
        settled = folded.origin(max(0, size - AFTER))
        for found in reversed(findings):  # from the end, so that spans that overlap wait together
            if found.start < limit < found.end or (settled < found.end and found.start < limit):
                limit = found.start
        return limit
