"""What the server counts. Every label has values from a table, so that no client can make new series."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gazelle.base.metrics import new_registry
from gazelle.data.profile import Drift

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/feedback", "/health", "/metrics")
OTHER = "other"
CANCELLED = "cancelled"
_WHOLE = ("stop", "length", "content_filter")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)
# How models that were taught to decline begin. A rough count, for watching how it moves.
_DECLINED = re.compile(
    r"\s*(?:i(?:['’]?m| am) (?:very |so )?(?:sorry|unable)|sorry, "
    r"|i (?:can(?:no|['’])t|won['’]?t) (?:help|assist|answer|do|provide|comply)|i(?:['’]m| am) not able to|as an ai\b"
    r"|(?:很|非常)?抱歉|对不起|我(?:无法|不能)(?:回答|帮|提供|协助))", re.IGNORECASE)


class Load(Protocol):
    """Whatever can say how busy it is."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...


@dataclass(frozen=True)
class Told:
    """One finished answer.

    Attributes:
        ids: of its prompt, and of the answer.
        finish: why it ended; "cancelled" if the client went, the code of the error if the server broke it off.
        first: of the answers to its prompt: a key pays for reading it once, as `usage` says.
    """

    model: str
    key: str
    prompt: Sequence[int]
    answer: Sequence[int]
    text: str
    finish: str
    first: bool = True


class ServerMetrics:
    """All metrics of one server, in three groups: resources, quality, business.

    Args:
        models: names that requests may ask for.
        keys: names of API keys.
        load: how busy the worker is.
        drifts: by model, where a profile of the training data is known.
    """

    def __init__(self, models: Iterable[str], keys: Iterable[str], load: Load,
                 drifts: Mapping[str, Drift] | None = None) -> None:
        self.registry = registry = new_registry()
        self._models, self._keys, self._drifts = frozenset(models), frozenset(keys), dict(drifts or {})
        for name, what, look in (
            ("gazelle_running_answers", "Answers being written, as one batch.", lambda: load.running),
            ("gazelle_queue_answers", "Answers waiting for a place in the batch.", lambda: load.waiting),
            ("gazelle_cached_tokens", "Tokens whose keys and values are held.", lambda: load.cached_tokens),
        ):
            Gauge(name, what, registry=registry).set_function(look)
        registry.register(_DriftCollector(self._drifts))

        self.first_token = Histogram("gazelle_first_token_seconds", "From asking to the first token.", ["model"],
                                     buckets=_SECONDS, registry=registry)
        self.inter_token = Histogram("gazelle_inter_token_seconds", "Between two tokens of an answer, on average.",
                                     ["model"], buckets=tuple(at / 10 for at in _SECONDS), registry=registry)
        self._prompt_tokens = Histogram("gazelle_prompt_tokens", "Tokens of a prompt.", ["model"], buckets=_TOKENS,
                                        registry=registry)
        self._answer_tokens = Histogram("gazelle_answer_tokens", "Tokens of an answer.", ["model"], buckets=_TOKENS,
                                        registry=registry)
        self._answers = Counter("gazelle_answers", "Answers, by why they ended.", ["model", "finish"],
                                registry=registry)
        self._declined = Counter("gazelle_declined_answers", "Answers that begin as models decline.", ["model"],
                                 registry=registry)
        self.verdicts = Counter("gazelle_guard_verdicts", "What the guard said of texts.", ["direction", "verdict"],
                                registry=registry)

        self._requests = Counter("gazelle_requests", "Requests.", ["path", "model", "status"], registry=registry)
        self._seconds = Histogram("gazelle_request_seconds", "A request in all.", ["path"], buckets=_SECONDS,
                                  registry=registry)
        self._key_requests = Counter("gazelle_key_requests", "Requests by API key, by its name.", ["key"],
                                     registry=registry)
        self._key_tokens = Counter("gazelle_key_tokens", "Tokens read and written by API key.", ["key", "kind"],
                                   registry=registry)
        self.feedback = Counter("gazelle_feedback", "What readers thought of answers.", ["model", "rating"],
                                registry=registry)

    def request(self, path: str, state: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count a request that has been answered or refused; 499 for one whose client went."""
        path = path if path in PATHS else OTHER
        model = state.get("model")
        self._requests.labels(path, model if model in self._models else OTHER, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if "key" in state and path.startswith("/v1/"):
            self._key_requests.labels(self._key(state["key"])).inc()

    def answer(self, told: Told) -> None:
        """Count an answer that has ended."""
        self._answers.labels(told.model, told.finish).inc()
        self._prompt_tokens.labels(told.model).observe(len(told.prompt))
        if told.first:
            self._key_tokens.labels(self._key(told.key), "prompt").inc(len(told.prompt))
        self._key_tokens.labels(self._key(told.key), "answer").inc(len(told.answer))
        if told.finish not in _WHOLE:
            return
        self._answer_tokens.labels(told.model).observe(len(told.answer))
        if _DECLINED.match(told.text):
            self._declined.labels(told.model).inc()
        if told.model in self._drifts:
            self._drifts[told.model].add(told.prompt, told.answer)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def _key(self, name: str) -> str:
        return name if name in self._keys else "anonymous"


class _DriftCollector(Collector):
    def __init__(self, drifts: Mapping[str, Drift]) -> None:
        self._drifts = drifts

    def collect(self) -> list[Metric]:
        family = GaugeMetricFamily(
            "gazelle_drift_index", "Population stability index of requests of late against training: above 0.25 much "
            "is otherwise.", labels=["model", "statistic"])
        for model, drift in self._drifts.items():
            for statistic, index in drift.indices().items():
                family.add_metric([model, statistic], index)
        return [family]
