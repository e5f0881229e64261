"""uvicorn around the application, with a drain in place of its sudden end."""

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from gazelle.base.errors import OptionError
from gazelle.base.log import logger
from gazelle.serve.app import create_app
from gazelle.serve.connections import protocol_class
from gazelle.serve.keys import Keys
from gazelle.serve.service import Service
from gazelle.serve.settings import Settings


class Server(uvicorn.Server):
    """Stops taking requests at the first SIGTERM or Ctrl-C, finishes those in progress, and ends with exit code 0.

    The second signal breaks them off.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn, which would have the signal end the process once all is done."""
        if self.should_exit or self._loop is None:
            self.force_exit = True
            self._service.ending.set()
        else:
            logger.info("Shutting down: answers in progress have %.0f s; a second signal breaks them off.",
                        self._service.settings.limits.drain_seconds)
            self._service.drain(self._loop)
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """A socket at the server's address, before a model is loaded for it; who connects waits until it is.

    Raises:
        OptionError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host.strip("[]"), settings.port))
        bound.listen()  # until then, a second server could bind the same port, and fail once its model is loaded
    except (OSError, UnicodeError) as error:
        bound.close()
        raise OptionError("the server cannot listen there", where="--host, --port",
                          found=f"{settings.host}:{settings.port}: {getattr(error, 'strerror', None) or error}",
                          expected="an address of this machine, and a port that is free",
                          fix="choose another --port, or stop what uses it") from error
    return bound


def make_server(service: Service, keys: Keys | None = None, ready: Callable[[], None] = lambda: None) -> Server:
    """A server that is yet to run. `ready` is called when it takes requests."""
    limits = service.settings.limits
    config = uvicorn.Config(
        create_app(service, keys), http=protocol_class(limits), ws="none", lifespan="on", log_config=None,
        access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.drain_seconds) + 5, h11_max_incomplete_event_size=1 << 15)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return Server(config, service, ready)
