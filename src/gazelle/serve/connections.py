"""uvicorn's connections with a limit on how long a client may take: to ask, and to read what it asked for.

A client that sends a byte a minute holds its connection until its time is over, or until newer connections need the
place; one that never reads is cut off once its buffers have been full for as long.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gazelle.serve.settings import Limits


def protocol_class(limits: Limits) -> type[H11Protocol]:
    """The class for uvicorn's `http`, for one server."""
    return type("BoundConnection", (Connection,), {"limits": limits, "idle": {}})


class Connection(H11Protocol):
    """One connection.

    Attributes:
        idle: connections of the server without a request in progress, the longest first.
    """

    limits: Limits
    idle: "dict[Connection, None]"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.connections and self.idle:
            next(iter(self.idle)).cut()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._arrived()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.idle[self] = None  # uvicorn's own timer for idle connections runs

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self._reading or self.loop.call_later(self.limits.receive_seconds, self.cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close it at once, without what is still to be written."""
        self.idle.pop(self, None)
        self.transport.abort()

    def _wait(self) -> None:
        self.idle.setdefault(self)
        if self._asking is None:
            self._asking = self.loop.call_later(self.limits.receive_seconds, self.cut)

    def _arrived(self) -> None:
        self.idle.pop(self, None)
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
