"""SafetyChecker: what a text holds that should not leave, and the text without it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gazelle.base.errors import OptionError, nearest
from gazelle.guard.contacts import CONTACTS
from gazelle.guard.credentials import CREDENTIALS
from gazelle.guard.detector import Detector
from gazelle.guard.findings import ACTIONS, Action, Finding, Verdict, masked, settle
from gazelle.guard.numbers import NUMBERS
from gazelle.guard.patterns import block_pattern
from gazelle.guard.views import View, fold, leet, together

if TYPE_CHECKING:
    from gazelle.guard.classifier import Classifier
    from gazelle.guard.stream import GuardStream

# How far a stream leaves text behind, in characters that can be seen: more than anything that is written in several
# words takes. A single word, number or key waits as a whole.
HOLD = 112
DETECTORS: tuple[Detector, ...] = (*CREDENTIALS, *NUMBERS, *CONTACTS)
KINDS = {
    group: tuple(dict.fromkeys(kind for detector in DETECTORS if detector.group == group for kind in detector.kinds))
    for group in ("pii", "secret")
}
REFUSAL = "This text was withheld."
# A match in letters that were put together or read out of digits is worth something from so many of them on.
_DISGUISED, _DISGUISED_HAN = 4, 2


class SafetyChecker:
    """Looks for patterns, personal data and secrets, whatever Unicode tricks they are written with.

    Args:
        block_patterns: regular expressions in RE2's syntax. A text that matches one is blocked. They are tried on the
            text as it is, with Unicode tricks undone, with letters spelt apart put together, and with leet undone.
        max_reject_score: findings and the classifier count when their score is above it, or is 1. Scores are 1 where
            a checksum or an unmistakable form proves a finding, 0.9 to 0.95 where it is likely.
        pii, secrets: what is done about personal data and about credentials: "mask", "block", "report" or "off".
        kinds: the kinds of personal data and secrets to look for; default: all (`gazelle.guard.checker.KINDS`).
        on_pattern: the same for `block_patterns`.
        refusal: what `filter` returns in place of a blocked text.
        classifier: a Hugging Face text-classification model, as a folder or hub name (safetensors only), or a callable
            that takes a list of texts and returns for each {"label", "score"} or a list of them, as a pipeline does.
        labels: the classifier's labels that mean a text is unsafe. Default: all but those that say it is safe.
        hold_back: how many visible characters a stream keeps back. Raise it if what tells that a block pattern matches
            may stand further behind the beginning of the match: the beginning has left then, and only what follows is
            kept back. Everything else that is looked for is told within the default, or waits as a whole.

    Raises:
        OptionError: an option or pattern that cannot be used; it says why.
        MissingDependencyError: `pip install gazelle[guard]` was not run.

    A checker holds no text and may be used from several threads.
    """

    def __init__(self, block_patterns: Iterable[str] = (), max_reject_score: float = 0.8, *, pii: str = "mask",
                 secrets: str = "mask", kinds: Iterable[str] | None = None, on_pattern: Action = "block",
                 refusal: str = REFUSAL, classifier: "str | Path | Callable[..., Any] | None" = None,
                 labels: Sequence[str] | None = None, hold_back: int = HOLD) -> None:
        if isinstance(block_patterns, str):
            raise OptionError("block_patterns is one text", where="block_patterns", found=repr(block_patterns),
                              expected="a list of regular expressions", fix="put it in brackets: [...]")
        number = isinstance(max_reject_score, int | float) and not isinstance(max_reject_score, bool)
        if not number or not 0 <= max_reject_score <= 1:
            raise OptionError("a score is a number from 0 to 1", where="max_reject_score", found=repr(max_reject_score),
                              expected="0 to 1", fix="leave it out for 0.8")
        for name, chosen in (("pii", pii), ("secrets", secrets), ("on_pattern", on_pattern)):
            if chosen not in (*ACTIONS, "off"):
                raise OptionError("unknown action", where=name, found=repr(chosen),
                                  expected=", ".join((*ACTIONS, "off")), fix=nearest(str(chosen), (*ACTIONS, "off")))
        if isinstance(hold_back, bool) or not isinstance(hold_back, int) or hold_back < HOLD:
            raise OptionError("a stream has to keep back more", where="hold_back", found=repr(hold_back),
                              expected=f"at least {HOLD} characters", fix=f"leave it out for {HOLD}")
        self.hold_back = hold_back
        self.patterns = tuple(block_pattern(source, number) for number, source in enumerate(block_patterns))
        self.max_reject_score, self.refusal = float(max_reject_score), refusal
        self._actions = {"pattern": on_pattern, "pii": pii, "secret": secrets, "classifier": "block"}
        self.kinds = self._wanted(kinds)
        self._detectors = tuple(detector for detector in DETECTORS if self.kinds & detector.kinds.keys()
                                and self._actions[detector.group] != "off")
        self.classifier = self._load(classifier, labels)

    @staticmethod
    def _wanted(kinds: Iterable[str] | None) -> frozenset[str]:
        known = [kind for group in KINDS.values() for kind in group]
        if kinds is None:
            return frozenset(known)
        wanted = frozenset([kinds] if isinstance(kinds, str) else kinds)
        for kind in sorted(wanted - set(known), key=str):
            raise OptionError(f"there is no kind {kind!r}", where="kinds", found=kind, expected=", ".join(known),
                              fix=nearest(str(kind), known))
        return wanted

    @staticmethod
    def _load(classifier: Any, labels: Sequence[str] | None) -> "Classifier | None":
        if classifier is None:
            if labels is not None:
                raise OptionError("labels without a classifier", where="labels", found=", ".join(labels),
                                  expected="classifier=", fix="name the classifier, or leave labels out")
            return None
        from gazelle.guard.classifier import Classifier

        return Classifier(classifier, labels)

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | str | Path") -> "SafetyChecker":
        """A checker from a dict, or a YAML file, with the arguments' names as keys.

        Raises:
            OptionError: no such file, no YAML, or a key that is no argument.
        """
        where = "guard"
        if isinstance(config, str | Path):
            where, config = str(config), _read(Path(config))
        names = list(inspect.signature(cls).parameters)
        for key in config:
            if key not in names:
                raise OptionError("unknown option of the guard", where=f"{where}, {key}", found=str(key),
                                  expected=", ".join(names), fix=nearest(str(key), names))
        return cls(**config)

    def check(self, text: str) -> Verdict:
        """What `text` holds. Time is in proportion to its length; positions are those of `text` itself.

        Raises:
            OptionError: `text` is no string.
        """
        if not isinstance(text, str):
            raise OptionError("only text can be checked", where="check", found=type(text).__name__, expected="a str",
                              fix="check each text by itself")
        found = list(self.scan(text, fold(text)))
        score = max((one.score for one in found), default=0.0)
        if self.classifier is not None:
            judged, label = self.classifier.score(text)
            score = max(score, judged)
            if self._counts(judged):
                found.append(Finding("unsafe", "classifier", 0, len(text), judged,
                                     f"the classifier says {label!r}", "block"))
        findings = settle(found)
        return Verdict(all(one.action != "block" for one in findings), score, findings)

    def filter(self, text: str) -> str:
        """`text` fit to pass on: `refusal` in place of the whole if anything blocks it, else `text` with its kind, such
        as "[EMAIL]", in place of every span that is to be masked; `text` itself if there is nothing."""
        return self.apply(text, self.check(text))

    def apply(self, text: str, verdict: Verdict) -> str:
        """What `filter` returns, given the verdict on `text`."""
        return masked(text, verdict.findings) if verdict.allowed else self.refusal

    def stream(self) -> "GuardStream":
        """For a text that comes in pieces: see `GuardStream`."""
        from gazelle.guard.stream import GuardStream

        return GuardStream(self)

    def scan(self, text: str, folded: View, position: int = 0) -> Iterator[Finding]:
        """Findings without the classifier's, in no order, that begin at character `position` of the views or later.

        Args:
            text: the text, or a part of one.
            folded: its folded view.
            position: 1 for a part from the middle, whose first character is there to be looked back at.
        """
        joined = together(folded) if self.patterns or any(detector.spelt for detector in self._detectors) else None
        yield from self._matched(text, folded, joined, position)
        for detector in self._detectors:
            if detector.needs and not any(sign in folded.text for sign in detector.needs):
                continue
            for view in (folded, joined) if detector.spelt and joined is not None else (folded,):
                for kind, (start, end, score) in detector.search(view.text, position):
                    if kind in self.kinds and self._counts(score):
                        yield Finding(kind, detector.group, *view.span(start, end), score, detector.kinds[kind],
                                      self._actions[detector.group])  # type: ignore[arg-type]

    def _matched(self, text: str, folded: View, joined: View | None, position: int) -> Iterator[Finding]:
        action = self._actions["pattern"]
        if not self.patterns or action == "off":
            return
        views = [(folded, 1)]
        if folded.text != text:
            views.append((View(text.encode("utf-8", "replace").decode()), 1))
        views += [(view, _DISGUISED) for view in (joined, *leet(folded)) if view is not None]
        for view, least in views:
            for number, pattern in enumerate(self.patterns):
                for start, end in pattern.spans(view.text, position):
                    if end - start >= (least if view.text[start:end].isascii() else min(least, _DISGUISED_HAN)):
                        yield Finding("pattern", "pattern", *view.span(start, end), 1.0,
                                      f"block_patterns[{number}] matches", action)  # type: ignore[arg-type]

    def _counts(self, score: float) -> bool:
        return score > self.max_reject_score or score >= 1


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise OptionError("no such file", where=str(path), found="a folder" if path.is_dir() else "nothing",
                          expected="a YAML file with the guard's options", fix="check the path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise OptionError("the file is not valid YAML", where=f"{path}, line {mark.line + 1}" if mark else str(path),
                          found=getattr(error, "problem", None) or str(error), expected="YAML in UTF-8",
                          fix="check indentation, quotes (patterns in 'single' ones) and colons there") from error
    if not isinstance(content, Mapping):
        raise OptionError("the file holds no options", where=str(path), found=type(content).__name__,
                          expected="keys such as block_patterns:", fix="write one option a line")
    return content
