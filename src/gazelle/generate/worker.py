"""A thread that drives a batcher and hands each event to whoever waits for it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from gazelle.base.errors import GazelleError
from gazelle.base.log import logger
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling
from gazelle.generate.request import Event, Request

Deliver = Callable[[Event], None]


class WorkerStoppedError(GazelleError):
    """The worker takes no requests any more."""


class Worker:
    """Runs `batcher.step()` as long as there is something to do, in a thread of its own.

    An error in a step ends the requests that were in it, each with an event whose reason is "error"; the thread goes on
    with the others. Should the thread end all the same, so do all requests.

    Args:
        batcher: which is this worker's alone from now on.

    Attributes:
        steps: passes so far.
        failures: those of them that raised.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.steps = self.failures = 0
        self._deliver: dict[Request, Deliver] = {}
        self._wake = threading.Condition()
        self._closing = self._draining = False
        self._thread = threading.Thread(target=self._run, name="gazelle-worker", daemon=True)

    def start(self) -> "Worker":
        """Begin. Returns this worker."""
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, ids: Sequence[int], sampling: Sampling, adapter: str | None = None, *,
               deliver: Deliver) -> Request:
        """As `Batcher.submit`; `deliver` is called in the worker's thread with each event, the last one with a reason.

        It must not wait. From asyncio: `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`.

        Raises:
            UserError: as `Batcher.submit`.
            WorkerStoppedError: after `drain` or `stop`.
        """
        request = self.batcher.prepare(ids, sampling, adapter)
        with self._wake:
            if self._draining or self._closing or not self.alive:
                raise WorkerStoppedError("the worker takes no requests any more")
            self.batcher.enqueue(request)
            self._deliver[request] = deliver
            self._wake.notify_all()
        return request

    def stream(self, ids: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Iterator[Event]:
        """Events of one prompt as they come. Leaving the loop early cancels it."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(ids, sampling, adapter, deliver=events.put)
        return self._events(request, events)

    def _events(self, request: Request, events: "queue.SimpleQueue[Event]") -> Iterator[Event]:
        try:
            while True:
                event = events.get()
                yield event
                if event.finish_reason:
                    return
        finally:
            if request.finish_reason is None:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """As `Batcher.cancel`."""
        with self._wake:
            self.batcher.cancel(request)
            self._wake.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait, at most `timeout` seconds, until all are answered. True if they are."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._deliver or not self.alive, timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Cancel what is left and end the thread, after the step that runs now."""
        with self._wake:
            self._closing = True
            for request in self._deliver:
                self.batcher.cancel(request)
            self._wake.notify_all()
        if self.alive:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self.batcher.busy)
                    if self._closing and not self.batcher.busy:
                        return
                self._hand_out(self._step())
        except Exception as error:  # noqa: BLE001 — it is logged, and handed to all that wait
            logger.critical("The thread of generation ended; nothing is answered any more.", exc_info=True)
            with self._wake:
                self._closing, left = True, list(self._deliver)
            self._hand_out([Event(request, finish_reason="error", error=error) for request in left])

    def _step(self) -> list[Event]:
        try:
            self.steps += 1
            return self.batcher.step()
        except Exception as error:  # noqa: BLE001 — it is logged, and handed to all that wait for this step
            self.failures += 1
            logger.exception("A step of generation failed; the requests in it end.")
            time.sleep(0.01)  # should every step fail at once, other threads still get to run
            return self.batcher.abort(error)

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            with self._wake:
                deliver = self._deliver.pop(event.request, None) if event.finish_reason \
                    else self._deliver.get(event.request)
                if event.finish_reason:
                    self._wake.notify_all()
            if deliver is None:
                continue
            try:
                deliver(event)
            except Exception:  # noqa: BLE001 — the listener's, such as a loop that is closed; the others go on
                logger.warning("Nobody takes the answer of request %d.", event.request.number, exc_info=True)
                self.batcher.cancel(event.request)
