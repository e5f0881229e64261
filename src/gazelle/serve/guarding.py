"""The guard between the server and the model: what is asked passes it whole, what is answered piece by piece."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gazelle.generate.request import Event
from gazelle.serve.errors import ApiError, refused
from gazelle.serve.metrics import ServerMetrics

if TYPE_CHECKING:
    from gazelle.guard.checker import SafetyChecker
    from gazelle.guard.findings import Verdict
    from gazelle.guard.stream import GuardStream

FILTERED = "content_filter"


class Guard:
    """A checker whose verdicts are counted. Its work is for threads: a classifier takes its time.

    Args:
        checker: of the room below.
        metrics: what is counted.
    """

    def __init__(self, checker: "SafetyChecker", metrics: ServerMetrics) -> None:
        self._checker, self._metrics = checker, metrics

    def asked(self, text: str, param: str) -> str:
        """`text` as it may go to the model, with what is to be masked masked.

        Raises:
            ApiError: it is blocked. The reasons are said, the text is not.
        """
        verdict = self._checker.check(text)
        self._note("input", verdict)
        if not verdict.allowed:
            kinds = ", ".join(dict.fromkeys(found.kind for found in verdict.findings if found.action == "block"))
            raise refused(f"The guard of this server blocks this text ({kinds}).", param, FILTERED)
        return self._checker.apply(text, verdict)

    def answer(self) -> "GuardStream":
        """For an answer that is about to be written."""
        return self._checker.stream()

    def passed(self, stream: "GuardStream", event: Event) -> Event:
        """An event with as much text as may leave. Once the text is blocked it is the last one, with the refusal."""
        text = stream.feed(event.text)
        if not (event.finish_reason or stream.blocked):
            return replace(event, text=text)
        text += stream.finish()
        if stream.verdict is not None:
            self._note("output", stream.verdict)
        return replace(event, text=text, finish_reason=FILTERED if stream.blocked else event.finish_reason)

    def _note(self, direction: str, verdict: "Verdict") -> None:
        masks = any(found.action == "mask" for found in verdict.findings)
        name = "blocked" if not verdict.allowed else "masked" if masks else "allowed"
        self._metrics.verdicts.labels(direction, name).inc()


def check_tellable(guard: Guard | None, logprobs: Any) -> None:
    """Refuse to tell tokens one by one where a guard holds text back.

    Raises:
        ApiError: that is asked for.
    """
    if guard is not None and logprobs not in (None, False):
        raise ApiError(400, "This server holds answers back until they are checked, so it tells no tokens: leave "
                       "logprobs out.", "unsupported_parameter", param="logprobs")
