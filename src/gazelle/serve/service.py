"""What one server holds: its models and worker, the places that are taken, and the answers that feedback may name."""

import asyncio
import itertools
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from gazelle.base.errors import nearest
from gazelle.generate.worker import Worker
from gazelle.serve.errors import ApiError, busy, unavailable
from gazelle.serve.guarding import Guard
from gazelle.serve.metrics import ServerMetrics
from gazelle.serve.prompts import ServedModel
from gazelle.serve.settings import Settings

_REMEMBERED = 10_000  # answers that feedback may name


class Service:
    """State shared by the requests of a server. Everything but the worker is touched by the event loop alone.

    Args:
        models: by name.
        worker: writes the answers; it has been started.
        settings: see there.
        metrics: what is counted.
        guard: checks what is asked and answered.
    """

    def __init__(self, models: Mapping[str, ServedModel], worker: Worker, settings: Settings,
                 metrics: ServerMetrics, guard: Guard | None = None) -> None:
        self.models, self.worker, self.settings, self.metrics = dict(models), worker, settings, metrics
        self.guard = guard
        self.draining = False
        self.pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
        self.ending = asyncio.Event()  # set when answers in progress have to break off
        self._taken = 0
        self._seconds = 1.0  # an answer takes, of late
        self._answers: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._numbers = itertools.count()

    @property
    def status(self) -> str:
        """"ok", "draining" or "failed"."""
        return "failed" if not (self.worker.alive or self.draining) else "draining" if self.draining else "ok"

    def model(self, name: str) -> ServedModel:
        """The model of a name; names are looked up in a table and nowhere else.

        Raises:
            ApiError: there is none.
        """
        if name not in self.models:
            raise ApiError(404, f"The model {name[:64]!r} does not exist here; {nearest(name[:64], self.models)}",
                           "model_not_found", param="model")
        return self.models[name]

    def take(self, places: int) -> None:
        """Take places for so many answers, until `give` is called.

        Raises:
            ApiError: so many are not free, or never will be.
        """
        limits = self.settings.limits
        if places > limits.choices:
            raise ApiError(400, f"A request has at most {limits.choices} answers, prompts times n.", "invalid_value",
                           param="n")
        if self.draining or not self.worker.alive:
            raise self.stopped()
        if self._taken + places > limits.running + limits.queue:
            rounds = math.ceil(self._taken / limits.running)
            raise busy(min(60, max(1, math.ceil(self._seconds * rounds))))
        self._taken += places

    def stopped(self) -> ApiError:
        """Why nothing is answered any more."""
        if self.draining:
            return unavailable("The server is shutting down.", "shutting_down")
        return unavailable("The worker has failed; the server's log says why.", "worker_failed")

    def give(self, places: int, seconds: float) -> None:
        """Give them back after so many seconds."""
        self._taken -= places
        self._seconds += 0.1 * (seconds - self._seconds)

    def new_id(self, kind: str, model: str, key: str) -> str:
        """An id that nobody can guess, for which this key may give feedback once."""
        name = f"{kind}-{secrets.token_hex(12)}"
        self._answers[name] = (model, key)
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)
        return name

    def rate(self, answer: str, key: str, rating: str) -> None:
        """Count feedback.

        Raises:
            ApiError: no such answer of late that went to this key, or it has been rated.
        """
        model, owner = self._answers.get(answer, (None, None))
        if model is None or owner != key:
            raise ApiError(404, "No answer of late has this id, or it has been rated.", "answer_not_found", param="id")
        del self._answers[answer]
        self.metrics.feedback.labels(model, rating).inc()

    def drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take no more requests; those in progress have `drain_seconds`."""
        if not self.draining:
            self.draining = True
            loop.call_soon_threadsafe(loop.call_later, self.settings.limits.drain_seconds, self.ending.set)

    def close(self) -> None:
        """Stop the threads."""
        self.worker.stop()
        self.pool.shutdown(wait=True, cancel_futures=True)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
