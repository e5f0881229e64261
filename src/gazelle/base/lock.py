"""A lock on a folder that dies with the process that holds it, however that ends."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from gazelle.base.errors import OutputError
from gazelle.base.log import say_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".gazelle.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: dict[Path, int] = {}  # folders that this process has locked, and the threads that did


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if need be, while the block lasts. The same thread may nest it.

    A record lock of the operating system: it is gone when its process is, also after `kill -9`, and children that
    the process forked do not hold on to it.

    Raises:
        OutputError: another run has the folder; names its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if _held.get(folder) == threading.get_ident():
        yield
        return
    if folder in _held:
        raise _in_use(folder, f"{os.getpid()}, another thread of this process")
    if fcntl is None:
        say_once("this system has no record locks: two runs in one folder are not noticed")
        yield
        return
    handle = _acquire(folder / LOCK)
    if handle is None:
        yield
        return
    _held[folder] = threading.get_ident()
    try:
        yield
    finally:
        del _held[folder]
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: who waits for it notices that it is gone
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Raise `OutputError` if another run has `folder`. Changes nothing."""
    path = folder.resolve() / LOCK
    if fcntl is None or folder.resolve() in _held or not path.exists():
        return
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _in_use(folder, _holder(handle)) from error
    finally:
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """A handle that holds the lock; None where the file system has none, as some shared ones do."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in _TAKEN:
                say_once(f"no locks here, so two runs in one folder are not noticed: {path.parent}: {error.strerror}")
                path.unlink(missing_ok=True)
                return None
            raise _in_use(path.parent, holder) from error
        try:
            current = path.stat().st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # its holder removed it between our two calls


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"


def _in_use(folder: Path, holder: str) -> OutputError:
    return OutputError("another run is writing to this folder", where=str(folder), found=f"process {holder}",
                       expected="one run a folder", fix="wait for it, stop it, or choose another output_dir")
