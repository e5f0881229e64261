"""One run a folder, told by a lock that dies with its process."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gazelle.base import lock
from gazelle.base.errors import OutputError
from gazelle.base.lock import LOCK, check_unlocked, folder_lock

HOLD = """
import sys, time, os
from pathlib import Path
from gazelle.base.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 1
    if child == 0:
        time.sleep(20)
        os._exit(0)
    print(child, flush=True)
    time.sleep(20)
"""


def hold(folder: Path, how: str = "alone") -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_another_process_is_kept_out_and_named(tmp_path: Path) -> None:
    process, _ = hold(tmp_path / "out")
    try:
        for attempt in (lambda: folder_lock(tmp_path / "out").__enter__(), lambda: check_unlocked(tmp_path / "out")):
            with pytest.raises(OutputError, match="another run is writing") as caught:
                attempt()
            assert caught.value.found.startswith(f"process {process.pid} on ")
    finally:
        process.kill()
        process.communicate()


def test_it_dies_with_its_process(tmp_path: Path) -> None:
    """Also where that had forked, as data loaders do."""
    process, child = hold(tmp_path, "fork")
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        check_unlocked(tmp_path)
        with folder_lock(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
        assert not (tmp_path / LOCK).exists()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_thread_may_nest_it_and_another_may_not_have_it(tmp_path: Path) -> None:
    caught: list[OutputError] = []

    def other() -> None:
        try:
            with folder_lock(tmp_path):
                pass
        except OutputError as error:
            caught.append(error)

    with folder_lock(tmp_path):
        with folder_lock(tmp_path):
            check_unlocked(tmp_path)
        assert (tmp_path / LOCK).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in caught[0].found
    other()
    assert len(caught) == 1


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unknown)
    with folder_lock(tmp_path):
        check_unlocked(tmp_path)
    assert "No locks available" in caplog.text and not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("1 on elsewhere")
    check_unlocked(tmp_path)
