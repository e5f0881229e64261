"""What a check says: findings with where and why, and a verdict over them. Neither holds any of the text."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["block", "mask", "report"]
ACTIONS = ("block", "mask", "report")
_RANK = {"report": 0, "mask": 1, "block": 2}


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        kind: what it is: "pattern", "email", "card", "github_token", ...; "unsafe" from the classifier.
        group: "pattern", "pii", "secret" or "classifier".
        start, end: characters of the text as it was given.
        score: 1 where a checksum or an unmistakable form proves it, less where it is likely.
        reason: why, in words, without the text itself.
        action: what is done about it.
    """

    kind: str
    group: str
    start: int
    end: int
    score: float
    reason: str
    action: Action


@dataclass(frozen=True)
class Verdict:
    """What a text holds, and whether it may pass.

    Attributes:
        allowed: False if any finding blocks it. What is masked is allowed.
        score: the highest score of all findings and of the classifier; 0 where there is nothing.
        findings: in order of the text.
    """

    allowed: bool
    score: float
    findings: tuple[Finding, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, each reason once, those that block first."""
        ordered = sorted(self.findings, key=lambda finding: -_RANK[finding.action])
        return tuple(dict.fromkeys(finding.reason for finding in ordered))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was found, each kind once, in order of the text."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for logs and answers of a server: no part of the text is in it."""
        return {"allowed": self.allowed, "score": self.score, "findings": [asdict(found) for found in self.findings]}


def settle(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings in order, without those that lie inside another one whose action is as strong."""
    kept: list[Finding] = []
    for found in sorted(set(findings), key=lambda one: (one.start, -one.end, -_RANK[one.action], -one.score, one.kind)):
        last = kept[-1] if kept else None
        if last is None or found.start >= last.end or found.end > last.end or _RANK[found.action] > _RANK[last.action]:
            kept.append(found)
    return tuple(kept)


def masked(text: str, findings: Iterable[Finding], begin: int = 0, end: int | None = None) -> str:
    """`text[begin:end]` with "[KIND]" in place of every span that is to be masked; spans that overlap become one."""
    pieces, position = [], begin
    for found in findings:
        if found.action == "mask" and found.end > position and (end is None or found.start < end):
            if found.start >= position:
                pieces += [text[position:found.start], f"[{found.kind.upper()}]"]
            position = found.end
    return "".join([*pieces, text[position:end]])
