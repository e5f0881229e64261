"""What long work is at, told to whoever watches: the command line draws it, and nobody else need care."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Watcher = Callable[[str, int, int], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def tell(what: str, done: int = 0, total: int = 0) -> None:
    """Say what is worked at now: a stage, or with `total` the piece `done` of so many."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(what, done, total)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` called with what `tell` is told, until the block ends."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
