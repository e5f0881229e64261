"""Writing that leaves either the old thing or the whole new thing, never half of one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gazelle.base.errors import OutputError


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

    The earlier `target`, if any, stays as it was until then, and for good when the block raises.
    """
    check_writable(target)
    if target.exists() and not overwrite and any(target.iterdir()):
        raise OutputError("the output folder is already in use", where=str(target), found="a folder with files in it",
                          expected="a new or empty folder", fix="choose another folder, or delete this one")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp makes it private; the finished folder is an ordinary one
        if target.exists():
            earlier = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(earlier / "it")
            staging.replace(target)
            shutil.rmtree(earlier)
        else:
            staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, in its existing folder, that takes its name when the block ends without an error.

    The earlier `target`, if any, stays as it was until then, and for good when the block raises.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o666 & ~umask)  # mkstemp makes it private; the finished file is an ordinary one
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: a reader sees the earlier file or the whole new one."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


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
