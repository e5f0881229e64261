"""What a server may be asked for, and where it listens."""

import dataclasses
import ipaddress
from dataclasses import dataclass, field

from gazelle.base.errors import OptionError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Limits:
    """Requests beyond these are refused, before work is done for them where that can be told.

    Attributes:
        running: answers written at a time, as one batch.
        queue: answers that may wait for a place in it.
        body_bytes: of a request.
        receive_seconds: in which a request has to have arrived.
        seconds: for a request in all, waiting included.
        connections: open at a time; beyond them, the oldest one that has not asked yet is closed.
        answer_tokens: of an answer; None for as many as the context has room for.
        choices: answers of one request: its prompts times `n`.
        messages: of a conversation.
        stops: stop strings.
        stop_characters: of each.
        schema_bytes: of a JSON schema.
        top_logprobs: likeliest tokens told for each.
        drain_seconds: that answers in progress have when the server is told to stop.
    """

    running: int = 16
    queue: int = 64
    body_bytes: int = 1 << 20
    receive_seconds: float = 20.0
    seconds: float = 300.0
    connections: int = 512
    answer_tokens: int | None = None
    choices: int = 8
    messages: int = 1000
    stops: int = 4
    stop_characters: int = 256
    schema_bytes: int = 1 << 14
    top_logprobs: int = 20
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None and not value >= (0 if option.name in ("queue", "drain_seconds") else 1e-3):
                raise OptionError("a limit has to be above zero", where=option.name, found=value,
                                  expected="a number above zero", fix=f"change {option.name}")


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        host, port: where it listens; port 0 for any that is free.
        allowed_hosts: names that requests may call the server by (`Host`); empty on another address than the loopback
            one: any. On the loopback address its own names alone, so that no web page can reach it under a name that
            it makes point here (DNS rebinding).
        temperature: of requests that state none.
        limits: see there.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    temperature: float = 1.0
    limits: Limits = field(default_factory=Limits)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that requests may call it by; empty for any."""
        if not self.loopback:
            return self.allowed_hosts
        host = self.host.strip("[]")
        return tuple(dict.fromkeys((*LOOPBACK, f"[{host}]" if ":" in host else host, *self.allowed_hosts)))


def is_loopback(host: str) -> bool:
    """True for "localhost" and addresses that never leave the machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposed(settings: Settings, *, keys: bool, allowed: bool) -> None:
    """Refuse to serve other machines without keys, unless that is asked for by name.

    Raises:
        OptionError: that would be the case.
    """
    if not (settings.loopback or keys or allowed):
        raise OptionError("anybody in the network could use the server", where="--host", found=settings.host,
                          expected="API keys, or the loopback address",
                          fix="make a key (gazelle serve-key NAME --file keys.json) and pass --api-keys keys.json; "
                              "behind a proxy that asks for them: --without-keys")
