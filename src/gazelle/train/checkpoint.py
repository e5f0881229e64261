"""Checkpoints on disk: staged, fsynced, listed in a manifest written last, renamed into place, verified before use.

    out/checkpoint-20/manifest.json    step, time, and size and SHA-256 of every other file, and of itself
    out/.checkpoint-30.…               one that is being written, or was when its process was killed

Whatever moment a process dies at, a folder called checkpoint-N is whole or does not verify.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gazelle.base.errors import OptionError, OutputError
from gazelle.base.files import sync_folder
from gazelle.base.log import logger

MANIFEST = "manifest.json"
FORMAT = 1
# Written by transformers alone: it has neither a manifest nor states of ours.
FOREIGN = ("optimizer.pt", "optimizer.bin")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAME = re.compile(r"checkpoint-\d+")  # a folder called otherwise, such as checkpoint-best-20, is somebody's own
_LEFT = re.compile(r"\.checkpoint-\d+\.(gone\.)?\w+")
SLACK = 2**24  # bytes that a tokenizer and JSON may take


@contextlib.contextmanager
def staged_checkpoint(target: Path, needed: int) -> Iterator[Path]:
    """A new folder that becomes the checkpoint `target` when the block ends without an error.

    Args:
        target: `…/checkpoint-N`.
        needed: bytes that it is going to take, roughly.

    Raises:
        OutputError: it could not be written; earlier checkpoints are as they were.
    """
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed:
        raise _no_room(target, needed)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    try:
        yield staging
        seal(staging, step_of(target))
        publish(staging, target)
    except (OSError, SafetensorError) as error:
        # safetensors gives the operating system's number only in words
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "os error 27" in str(error):
            shutil.rmtree(staging, ignore_errors=True)
            raise _no_room(target, needed) from error
        raise OutputError("the checkpoint could not be written", where=str(target), found=str(error),
                          expected="a folder that can be written to", fix=_kept(folder)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def seal(folder: Path, step: int) -> None:
    """Bring every file of `folder` to the disk, then the manifest."""
    files = {}
    for path in _files(folder):
        with path.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    for inner in {path.parent for path in _files(folder)}:
        sync_folder(inner)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_manifest_text({"format": FORMAT, "step": step, "saved": time.time(), "files": files}))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def publish(staging: Path, target: Path) -> None:
    """Rename a sealed folder into place. `recover` mends what a kill between two renames leaves."""
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)  # mkdtemp makes it private
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        target.replace(aside)
        staging.replace(target)
        shutil.rmtree(aside)
    else:
        staging.replace(target)
    sync_folder(target.parent)


def recover(folder: Path) -> None:
    """Clear away what killed processes left in `folder`; a whole checkpoint among it gets its name.

    Only for who has the folder's lock.
    """
    left = [path for path in folder.glob(".checkpoint-*") if path.is_dir() and _LEFT.fullmatch(path.name)]
    for path in sorted(left, key=_saved, reverse=True):
        home = folder / path.name[1:].split(".")[0]
        if ".gone." not in path.name and not home.exists() and fault(path, step=step_of(home)) is None:
            path.replace(home)
            logger.info("%s was whole but had not got its name when its process was killed: it has now.", home)
        else:
            shutil.rmtree(path)


def rotate(folder: Path, limit: int | None, spared: Iterable[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left; those in `spared` and the newest stay."""
    if not limit or limit < 1:
        return
    newest_first = checkpoints(folder)
    stay = {path.resolve() for path in (*spared, *newest_first[:1])}
    for path in reversed(newest_first):
        if len(newest_first) <= max(limit, len(stay)):
            return
        if path.resolve() in stay:
            continue
        newest_first.remove(path)
        try:
            # Renamed first: a kill while files are deleted leaves no half checkpoint under its name.
            shutil.rmtree(path.replace(Path(tempfile.mkdtemp(prefix=f".{path.name}.gone.", dir=folder))))
        except OSError as error:  # the new one is whole: no reason to end the run
            logger.warning("The old checkpoint %s could not be deleted: %s.", path, error)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sound or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_saved(path), step_of(path)), reverse=True)


def step_of(path: Path) -> int:
    """20 of `checkpoint-20`."""
    return int(path.name.rpartition("-")[2])


def size_of(path: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in _files(path))


def fault(path: Path, *, step: int | None = None, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        path: its folder.
        step: that it should be of, where the folder's name does not say.
        thorough: read every file and compare its hash, not only its size.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if text != _manifest_text({name: value for name, value in manifest.items() if name != "sha256"}):
            return f"{MANIFEST} is not what was written"
    except FileNotFoundError:
        return _fault_without_manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if manifest["format"] != FORMAT:
        return f"its format is {manifest['format']}, which this release does not know"
    named = step if step is not None else step_of(path) if _NAME.fullmatch(path.name) else None
    if named is not None and manifest["step"] != named:
        return f"it is of step {manifest['step']}"
    for name, (size, digest) in files.items():
        try:
            with (path / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return f"{name} has {os.fstat(file.fileno()).st_size} bytes instead of {size}"
                if thorough and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None if "trainer_state.json" in files else "it holds a model, but no state of training"


def is_foreign(path: Path) -> bool:
    """True for a checkpoint that transformers wrote: there is nothing to verify it by."""
    return not (path / MANIFEST).exists() and any((path / name).exists() for name in FOREIGN)


def find_checkpoint(resume: str | Path | bool | None, output_dir: str, *, thorough: bool = True) -> Path | None:
    """The checkpoint to go on from: with True the newest in `output_dir` that verifies; those skipped are logged.

    Args:
        resume: True, the path of a checkpoint, or nothing to start anew.
        output_dir: the run's folder.
        thorough: as in `fault`.

    Raises:
        OptionError: there is none, or none that is sound.
    """
    if not resume:
        return None
    if resume is not True:
        path = Path(resume)
        if reason := fault(path, thorough=thorough):
            others = [str(other) for other in checkpoints(path.parent) if other != path
                      and fault(other, thorough=thorough) is None]
            raise OptionError("this is not a checkpoint to resume from", where=str(path), found=reason,
                              expected="a whole checkpoint-N folder",
                              fix=f"resume from {others[0]}" if others else "start anew, without resuming")
        return path
    folder = Path(output_dir)
    damaged: list[str] = []
    for path in checkpoints(folder):
        reason = fault(path, thorough=thorough)
        if reason is None:
            if damaged:
                logger.warning("Going on from %s. Skipped %s.", path, "; ".join(damaged))
            return path
        damaged.append(f"{path}: {reason}")
    if damaged:
        raise OptionError("no checkpoint here is whole", where=str(folder), found="; ".join(damaged),
                          expected="one that is as it was written", fix="start anew, without resuming")
    raise OptionError("there is no checkpoint to resume from", where=str(folder), found="no checkpoint-N folder",
                      expected="a folder in which training was started before", fix="start anew, without resuming")


def _fault_without_manifest(path: Path) -> str | None:
    if not path.is_dir():
        return "there is no such folder"
    if not is_foreign(path):
        return f"{MANIFEST} is missing, so it was never finished or is no checkpoint"
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    return None


def _manifest_text(manifest: dict[str, Any]) -> str:
    """One spelling for each content, so that any other byte is noticed."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _saved(path: Path) -> float:
    """When it was written, as it says itself: copying changes a file's own time."""
    try:
        return float(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["saved"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _no_room(target: Path, needed: int) -> OutputError:
    free = shutil.disk_usage(target.parent).free
    return OutputError("the disk is too full for a checkpoint", where=str(target), found=f"{free / 1e6:,.0f} MB free",
                       expected=f"{needed / 1e6:,.0f} MB", fix=f"make room, then resume; {_kept(target.parent)}")


def _kept(folder: Path) -> str:
    sound = next((path for path in checkpoints(folder) if fault(path, thorough=False) is None), None)
    return f"{sound} is there to resume from" if sound else "there is no earlier checkpoint"
