"""Writing that leaves either the old thing or the whole new thing, never half of one.

What is not finished lies beside its place under a name with a dot before it, locked by the process that writes it. One
that nobody holds was left by a killed process, and the next write to the same place clears it away.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gazelle.base.errors import OutputError

if sys.platform != "win32":
    import fcntl

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_WRITING, _EARLIER = "writing", "earlier"
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2; macOS' renamex_np has the same number for the same thing


def check_writable(folder: Path) -> None:
    """Raise `OutputError` if `folder` cannot be created or written to. Leaves nothing behind."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError("the output path runs through a file", where=str(folder), found=f"{nearest} is a file",
                          expected="a folder", fix="choose another output folder")
    try:
        # os.access is wrong for root and on read-only mounts; an actual write is not.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError("the output folder cannot be written to", where=str(folder),
                          found=error.strerror or str(error), expected="a folder you may write to",
                          fix="choose another folder, or change its permissions") from error


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends without an error.

    The earlier `target`, if any, stays as it was until then, and for good when the block raises. The two change places
    in one step where the system can do that.

    Raises:
        OutputError: the place cannot be written to, or the disk fills up in the block.
    """
    check_writable(target)
    _clear_leftovers(target)
    if target.exists() and not overwrite and any(target.iterdir()):
        raise OutputError("the output folder is already in use", where=str(target), found="a folder with files in it",
                          expected="a new or empty folder", fix="choose another folder, or delete this one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as staging:
        with disk_errors(target):
            yield staging
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the finished folder is an ordinary one
        _put_in_place(staging, target)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, in its existing folder, from which things are renamed; it goes away with the block."""
    _clear_leftovers(target)
    with _beside(target, lambda prefix: tempfile.mkdtemp(prefix=prefix, dir=target.parent)) as scratch:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, in its existing folder, that takes its name when the block ends without an error.

    The earlier `target`, if any, stays as it was until then, and for good when the block raises.
    """
    _clear_leftovers(target)
    with _beside(target, lambda prefix: _closed(*tempfile.mkstemp(prefix=prefix, dir=target.parent))) as staging:
        try:
            yield staging
            staging.chmod(0o666 & ~_umask())  # mkstemp makes it private; the finished file is an ordinary one
            staging.replace(target)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Say as an `OutputError` that the disk is full, or that a limit on files has been reached."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OutputError("the files cannot be written", where=str(target), found=f"{error.strerror or error}; "
                          f"{free_bytes(target):,} bytes free", expected="more room, or a larger limit on file sizes",
                          fix="make room, or choose a folder on another disk") from error


def free_bytes(target: Path) -> int:
    """Bytes free on the disk on which `target` lies, or will lie."""
    return shutil.disk_usage(next(folder for folder in (target, *target.parents) if folder.exists())).free


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: a reader sees the earlier file or the whole new one."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def make_readable(*files: Path) -> None:
    """Give files the mode of ordinary new ones: safetensors makes its files private, whatever the umask."""
    for file in files:
        file.chmod(0o666 & ~_umask())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk; its files have to be synced by themselves."""
    if os.name == "nt":
        return  # where folders cannot be opened, and renames are journalled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Converted checkpoints live here: `$GAZELLE_CACHE`, else `$XDG_CACHE_HOME/gazelle`, else `~/.cache/gazelle`."""
    if chosen := os.environ.get("GAZELLE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gazelle"


def _put_in_place(staging: Path, target: Path) -> None:
    """Give `staging` the name of `target`; what had it is `staging` then, or gone."""
    if not target.exists():
        staging.replace(target)
    elif not _exchange(staging, target):
        # A kill between the two renames leaves the earlier folder under the first name: `_clear_leftovers` mends it.
        earlier = target.with_name(f".{target.name}.{_EARLIER}-{staging.name[-8:]}")
        target.replace(earlier)
        staging.replace(target)
        shutil.rmtree(earlier)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    if sys.platform == "win32":
        return False
    libc, first, second = ctypes.CDLL(None), os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE) == 0)
    return bool(hasattr(libc, "renamex_np") and libc.renamex_np(first, second, _EXCHANGE) == 0)


@contextlib.contextmanager
def _beside(target: Path, make: Callable[[str], str]) -> Iterator[Path]:
    """Something new beside `target`, locked. The lock goes with the process, and tells that somebody writes here."""
    while True:
        staging = Path(make(f".{target.name}.{_WRITING}-"))
        handle, held = _lock(staging)
        if not held and staging.exists():
            break
        if handle is not None:  # another process took it for a leftover before it was locked
            os.close(handle)
    try:
        yield staging
    finally:
        if handle is not None:
            os.close(handle)


def _closed(handle: int, name: str) -> str:
    os.close(handle)
    return name


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _lock(path: Path) -> tuple[int | None, bool]:
    """(a handle that holds the lock of a file or folder, False); without a handle, whether somebody else has the lock.

    Neither where locks are not to be had, or the path is gone.
    """
    if sys.platform == "win32":
        return None, False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return None, isinstance(error, BlockingIOError)
    return handle, False


def _clear_leftovers(target: Path) -> None:
    """Delete what killed processes left beside `target`; an earlier folder that lost its name gets it back."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({_WRITING}|{_EARLIER})-[a-z0-9_]{{8}}")
    for entry in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(entry.name)
        if found is None or (handle := _lock(entry)[0]) is None:
            continue
        try:
            if found[1] == _EARLIER and not target.exists():
                entry.replace(target)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        finally:
            os.close(handle)
