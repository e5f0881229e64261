"""One request from the places it takes to its last byte, whole or as a stream."""

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from gazelle.base.errors import UserError
from gazelle.base.log import logger
from gazelle.generate.request import Event, Request
from gazelle.generate.sample import Logprob
from gazelle.generate.worker import WorkerStoppedError
from gazelle.serve.errors import ApiError, from_user_error, unavailable
from gazelle.serve.forms import Form
from gazelle.serve.gate import Receive, Scope, Send, until_gone
from gazelle.serve.metrics import CANCELLED, Told
from gazelle.serve.prompts import Job, ServedModel
from gazelle.serve.service import Service


@dataclass
class Choice:
    """One answer as far as it has come."""

    job: Job
    request: Request | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str | None = None
    first_at: float | None = None
    last_at: float = 0.0
    guarded: Any = None


class Answer(Response):
    """The response to a completion or chat request: asks the worker, and writes what comes.

    Whatever happens, the places are given back and what is still being written is cancelled.

    Args:
        service: of the server.
        model: that was asked for.
        form: how requests and answers of this endpoint look.
    """

    def __init__(self, service: Service, model: ServedModel, form: Form) -> None:
        super().__init__()
        self._service, self._model, self._form = service, model, form
        self._choices: list[Choice] = []
        self._coming: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._began = 0.0
        self._key = "anonymous"
        self._broken = CANCELLED  # why answers that have no end of their own ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes first."""
        self._key = scope["state"]["key"]
        self._began = time.perf_counter()
        service, places = self._service, self._form.places
        service.take(places)
        self._form.id = service.new_id(self._form.prefix, self._model.name, self._key)
        try:
            await until_gone(receive, self._answer(send))
        finally:
            for index, choice in enumerate(self._choices):
                if choice.finish is None and choice.request is not None:
                    service.worker.cancel(choice.request)
                self._count(choice, first=index % self._form.each == 0)
            service.give(places, time.perf_counter() - self._began)

    async def _answer(self, send: Send) -> None:
        started = False
        try:
            async with asyncio.timeout(self._service.settings.limits.seconds):
                await self._submit()
                if self._form.stream:
                    async for line in self._lines():
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                        await send({"type": "http.response.body", "body": line, "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
                else:
                    async for _ in self._events():
                        pass
                    body = await asyncio.get_running_loop().run_in_executor(self._service.pool, self._whole)
                    await send({"type": "http.response.start", "status": 200, "headers": [
                        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                        (b"x-request-id", self._form.id.encode())]})
                    await send({"type": "http.response.body", "body": body})
        except (TimeoutError, ApiError) as error:
            if isinstance(error, TimeoutError):
                error = unavailable("The answer took longer than the server allows.", "time_limit")
            if error.status >= 500:
                self._broken = error.code
            if not started:
                raise error from None
            # The status has been sent: a stream says it as OpenAI's does, as its last event.
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": False})

    def _whole(self) -> bytes:
        """For a thread: with the likeliest tokens of thousands, it takes seconds to write."""
        return json.dumps(self._form.whole(self._choices), ensure_ascii=False).encode()

    async def _submit(self) -> None:
        """Prepare in a thread, where long texts hold up nobody, and ask the worker."""
        loop = asyncio.get_running_loop()
        service = self._service
        try:
            jobs = await loop.run_in_executor(service.pool, self._form.jobs, self._model, service.settings,
                                              service.guard)
        except UserError as error:
            raise from_user_error(error) from error
        for index, job in enumerate(jobs):
            self._choices.append(choice := Choice(job))
            asked = loop.run_in_executor(service.pool, functools.partial(
                service.worker.submit, job.ids, job.sampling, self._model.adapter,
                deliver=functools.partial(self._deliver, loop, index)))
            try:
                choice.request = await asyncio.shield(asked)
            except asyncio.CancelledError:
                asked.add_done_callback(self._unwanted)  # the thread asks all the same
                raise
            except UserError as error:
                choice.finish = "refused"
                raise from_user_error(error) from error
            except WorkerStoppedError as error:
                raise service.stopped() from error

    def _unwanted(self, asked: "asyncio.Future[Request]") -> None:
        if not asked.cancelled() and asked.exception() is None:
            self._service.worker.cancel(asked.result())

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int, event: Event) -> None:
        """Called in the worker's thread, which may outlive the loop by a moment."""
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._coming.put_nowait, (index, event))

    async def _events(self) -> AsyncIterator[tuple[Choice, int, Event]]:
        """Events of all choices as they come, until each has ended."""
        ending = asyncio.ensure_future(self._service.ending.wait())
        try:
            while any(choice.finish is None for choice in self._choices):
                coming = asyncio.ensure_future(self._coming.get())
                try:
                    await asyncio.wait((coming, ending), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise unavailable("The server is shutting down.", "shutting_down")
                finally:
                    coming.cancel()
                index, event = coming.result()
                choice = self._choices[index]
                if choice.finish is not None:
                    continue  # the guard ended it, and the worker had not heard of that yet
                if event.error is not None:
                    logger.error("an answer failed: %s", event.error)
                    raise ApiError(500, "The model failed; the server's log says why.", "worker_failed")
                if event.finish_reason == "cancelled":
                    raise unavailable("The server is shutting down.", "shutting_down")
                yield choice, index, await self._noted(choice, event)
        finally:
            ending.cancel()

    async def _noted(self, choice: Choice, event: Event) -> Event:
        """The event as it may be shown, added to its choice."""
        if event.tokens:
            choice.last_at = time.perf_counter()
            if choice.first_at is None:
                choice.first_at = choice.last_at
                self._service.metrics.first_token.labels(self._model.name).observe(choice.first_at - self._began)
        guard = self._service.guard
        if guard is not None:
            choice.guarded = choice.guarded or guard.answer()
            event = await asyncio.get_running_loop().run_in_executor(
                self._service.pool, guard.passed, choice.guarded, event)
            if choice.guarded.blocked and choice.request is not None:
                self._service.worker.cancel(choice.request)
        choice.text += event.text
        choice.ids += event.tokens
        choice.logprobs += event.logprobs
        choice.finish = event.finish_reason
        return event

    async def _lines(self) -> AsyncIterator[bytes]:
        for index in range(len(self._choices)):
            if (opening := self._form.opening(index)) is not None:
                yield _event(opening)
        async for choice, index, event in self._events():
            for chunk in self._form.chunks(index, choice, event):
                yield _event(chunk)
        if self._form.with_usage:
            yield _event(self._form.usage_chunk(self._choices))
        yield b"data: [DONE]\n\n"

    def _count(self, choice: Choice, *, first: bool) -> None:
        if choice.finish == "refused":
            return
        metrics, written = self._service.metrics, len(choice.ids)
        if choice.first_at is not None and written > 1:
            metrics.inter_token.labels(self._model.name).observe((choice.last_at - choice.first_at) / (written - 1))
        metrics.answer(Told(self._model.name, self._key, choice.job.ids, choice.ids, choice.text[:200],
                            choice.finish or self._broken, first))


_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no")]

# Ends of lines to Unicode, and to clients that split text by those in place of SSE's; JSON has them in strings alone.
_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\u0085\u2028\u2029"}


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).translate(_ENDS)
    return b"data: " + text.encode() + b"\n\n"
