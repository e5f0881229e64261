"""Regular expressions whose time is linear in the text, by RE2."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gazelle.base.errors import OptionError
from gazelle.base.optional import require

# RE2 takes time in proportion to the text for one search, but a search for each match may look as far as the end every
# time. After so many matches, or so long, what is left of the text counts as matched: it is not let through unseen.
MATCHES = 256
SECONDS = 2.0


@dataclass(frozen=True)
class Pattern:
    """A user's expression and its compiled form."""

    source: str
    compiled: Any

    def spans(self, text: str, position: int = 0) -> Iterator[tuple[int, int]]:
        """Matches that are not empty, from `position` on; see `MATCHES` and `SECONDS`."""
        limit, count = time.monotonic() + SECONDS, 0
        for match in self.compiled.finditer(text, position):
            start, end = match.span()
            if end == start:
                continue
            count += 1
            if count == MATCHES or time.monotonic() > limit:
                yield start, len(text)
                return
            yield start, end


def compile_re2(source: str) -> Any:
    """`source` compiled by RE2, which says nothing on stderr; raises `re2.error`."""
    re2 = require("re2")
    options = re2.Options()
    options.log_errors = False
    return re2.compile(source, options=options)


def block_pattern(source: Any, number: int) -> Pattern:
    """A pattern of `block_patterns`, compiled.

    Raises:
        OptionError: no text, no pattern, one that matches everything, or one that RE2 does not take, such as one with
            a look-behind or a back reference; it says why.
    """
    where = f"block_patterns[{number}]"
    if not isinstance(source, str):
        raise OptionError("a pattern is not a text", where=where, found=repr(source), expected="a regular expression",
                          fix="pass the expression itself, without re.compile")
    re2 = require("re2")
    try:
        compiled = compile_re2(source)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else reason
        raise OptionError("the pattern cannot be used", where=where, found=f"{source!r}: {reason}",
                          expected="RE2's syntax: no look-ahead, look-behind or back reference, since these cannot be "
                          "matched in bounded time", fix="write the words that are to be found, without conditions on "
                          "what stands around them but for \\b, ^ and $") from error
    if compiled.fullmatch("") is not None:
        raise OptionError("the pattern matches the empty text, so it would be found everywhere", where=where,
                          found=repr(source), expected="a pattern that takes at least one character",
                          fix="replace * by + where something has to be there")
    return Pattern(source, compiled)
