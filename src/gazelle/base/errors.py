"""Every error gazelle raises on purpose.

A user's mistake says what was found, what was expected, where, and what to do; the command line prints it without a
traceback and exits with 2. Anything else that reaches the user as a traceback is a fault of ours.
"""

import difflib
from collections.abc import Iterable


class GazelleError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class UserError(GazelleError, ValueError):
    """Something the user can mend.

    Args:
        what: the mistake, as one sentence without a full stop.
        where: file and row, tensor, or option it was found in.
        found: the offending value or state; long values are shortened.
        expected: what would have been accepted.
        fix: the next thing to type or do.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str = "", found: object = None, expected: str = "", fix: str = ""
    ) -> None:
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        self.found = "" if found is None else shorten(str(found))
        super().__init__(what)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors by pickle, which would otherwise drop the keyword arguments.
        return (_rebuild, (type(self), self.what, self.where, self.found, self.expected, self.fix))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        for label, text in (("found", self.found), ("expected", self.expected), ("to do", self.fix)):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return "\n".join(lines)


class OptionError(UserError):
    """An argument, recipe key or command-line option that cannot be used."""


class DataError(UserError):
    """A data set, file or row that cannot be used."""


class ModelError(UserError):
    """A checkpoint, tokenizer or adapter that cannot be used."""


class TrainingError(UserError):
    """A run that cannot go on."""


class OutputError(UserError):
    """A place that cannot be written to."""


class HubError(UserError):
    """The hub cannot be reached, or refuses."""


class MissingDependencyError(UserError):
    """An optional package that the asked-for feature needs."""


def _rebuild(cls: type[UserError], what: str, where: str, found: str, expected: str, fix: str) -> UserError:
    return cls(what, where=where, found=found or None, expected=expected, fix=fix)


def shorten(text: str, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as "did you mean 'learning_rate'?", or the candidates when none is near."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "use one of: " + ", ".join(names)
