"""What every request passes before the application sees it: the name it calls the server by, its key, its size."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gazelle.base.log import logger
from gazelle.serve.errors import ApiError, busy
from gazelle.serve.keys import Keys
from gazelle.serve.metrics import ServerMetrics
from gazelle.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = "/health"
_HEADERS = 1 << 15  # bytes
_LARGE, _PAUSE = 1 << 16, 0.01  # bytes, seconds
_HOST = re.compile(r"(\[[0-9a-f:.]*\]|[^:\[\]]*)(?::\d*)?")
ANONYMOUS = "anonymous"


class ClientGoneError(Exception):
    """The client closed the connection before it had an answer."""


class Gate:
    """ASGI middleware around everything: refuses, counts, and answers errors in OpenAI's form.

    Args:
        app: the application.
        settings: hosts and limits.
        keys: None where none are asked for.
        metrics: what is counted.
    """

    def __init__(self, app: App, settings: Settings, keys: Keys | None, metrics: ServerMetrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics
        self._large = asyncio.Lock()
        self._large_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, whole = time.perf_counter(), 0, False
        state = scope.setdefault("state", {})

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADERS:
                raise ApiError(431, f"The headers are larger than {_HEADERS:,} bytes.", "headers_too_large",
                               headers={"connection": "close"})
            self._check_host(scope)
            state["key"] = self._name_of_key(scope)
            await self._app(scope, await self._body(scope, receive), counted)
        except ClientGoneError:
            status = 499
        except ApiError as error:
            if status:  # the answer has begun, and the client sees it break off
                logger.warning("an answer broke off: %s", error.message)
            else:
                await answer_error(error, counted)
        except Exception:
            logger.exception("an answer failed: %s %r", scope["method"], scope["path"])
            if not status:
                await answer_error(failure(), counted)
            elif not whole:
                raise
        finally:
            self._metrics.request(scope["path"], state, status or 499, time.perf_counter() - began)

    def _check_host(self, scope: Scope) -> None:
        allowed = self._settings.hosts
        if not allowed:
            return
        named = _HOST.fullmatch(_one_header(scope, b"host").lower())
        if named is None or named[1] not in allowed:
            raise ApiError(421, "The server is not known by that name; it is in Host.", "host_not_allowed",
                           headers={"connection": "close"})

    def _name_of_key(self, scope: Scope) -> str:
        if self._keys is None or scope["path"] == OPEN:
            return ANONYMOUS
        scheme, _, key = _one_header(scope, b"authorization").partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise ApiError(401, "No valid API key: send it as 'Authorization: Bearer KEY'.", "invalid_api_key",
                           headers={"www-authenticate": "Bearer", "connection": "close"})
        return name

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The request with its body read, within the limit whether or not it says how large it is."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        limit = self._settings.limits.body_bytes
        length = _one_header(scope, b"content-length")
        if length and int(length) > limit:
            raise _too_large(limit)
        kind = _one_header(scope, b"content-type").partition(";")[0].strip().lower()
        if kind != "application/json":  # a form that any web page may send without asking first
            raise ApiError(415, "The body has to be JSON, with Content-Type: application/json.",
                           "unsupported_media_type")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            more = message.get("more_body", False)
        body: bytes | None = b"".join(parts)
        if size > _LARGE:
            # Reading a megabyte of JSON takes a fifth of a second, in which the loop does nothing else: one at a time,
            # with a pause for everybody else in between.
            limits = self._settings.limits
            if self._large_waiting >= limits.running + limits.queue:  # each holds its body
                raise busy(1)
            self._large_waiting += 1
            try:
                async with self._large:
                    await asyncio.sleep(_PAUSE)
            finally:
                self._large_waiting -= 1

        async def replay() -> MutableMapping[str, Any]:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        return replay


async def until_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work`, and cancel it when the client goes.

    Raises:
        ClientGoneError: it went first.
    """
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def failure() -> ApiError:
    """A fault of ours."""
    return ApiError(500, "The server failed; its log says why.", "internal_error")


async def answer_error(error: ApiError, send: Send) -> None:
    """Send an error as the whole answer."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    await send({"type": "http.response.start", "status": error.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit:,} bytes.", "body_too_large")


def _one_header(scope: Scope, name: bytes) -> str:
    """The value of a header, "" if there is none; several are refused, as programs disagree which one counts."""
    values = [value for key, value in scope["headers"] if key == name]
    if len(values) > 1:
        raise ApiError(400, f"The header {name.decode()} came more than once.", "duplicate_header")
    return values[0].decode("latin-1") if values else ""
