"""Folders and files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from gazelle.base.errors import OutputError
from gazelle.base.files import cache_folder, check_writable, staged_folder, write_text


def test_a_staged_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o700 == 0o700


def test_a_failed_staged_folder_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_drops_the_earlier_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("old")
    with staged_folder(target) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_used_folder_can_be_protected(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="already in use"), staged_folder(tmp_path, overwrite=False):
        pass


def test_write_text_replaces_and_cleans_up(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    write_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "2"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "2"
    assert os.listdir(tmp_path) == ["a"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="through a file"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(Path("/proc/out"))  # read-only for root as well
    check_writable(tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("GAZELLE_CACHE", raising=False)
    assert cache_folder() == Path("/x/gazelle")
    monkeypatch.setenv("GAZELLE_CACHE", "/y")
    assert cache_folder() == Path("/y")


def test_what_a_killed_process_left_is_cleared_and_what_another_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.writing-abcd1234").mkdir()
    (tmp_path / ".out.writing-abcd1234" / "half").write_text("x")
    (tmp_path / ".out.settings").write_text("somebody's")
    with staged_folder(target) as first:
        with staged_folder(target) as second:
            assert first.exists() and second != first
        assert first.exists()
        (first / "a").write_text("1")
    assert sorted(os.listdir(tmp_path)) == [".out.settings", "out"]
    (tmp_path / ".a.writing-00000000").write_text("half")
    write_text(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == [".out.settings", "a", "out"]


def test_what_another_process_takes_for_a_leftover_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have the lock and be about to delete, or have deleted between our opening and locking."""
    import fcntl

    from gazelle.base import files

    original, handles = files._lock, []

    def meddled(path: Path) -> tuple[int | None, bool]:
        handles.append(os.open(path, os.O_RDONLY))
        if len(handles) == 1:
            fcntl.flock(handles[0], fcntl.LOCK_EX)
            return original(path)
        found = original(path)
        if len(handles) == 2:
            path.rmdir()
        return found

    monkeypatch.setattr(files, "_lock", meddled)
    with staged_folder(tmp_path / "out") as folder:
        assert len(handles) == 3 and folder.exists()
        (folder / "a").write_text("whole")
    for handle in handles:
        os.close(handle)
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_where_names_cannot_be_swapped_a_kill_between_two_renames_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gazelle.base import files

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    for text in ("1", "2"):
        with staged_folder(target) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "2" and os.listdir(tmp_path) == ["out"]
    target.replace(tmp_path / ".out.earlier-abcd1234")
    with pytest.raises(RuntimeError), staged_folder(target):
        assert (target / "a").read_text() == "2"
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_said_as_such(tmp_path: Path) -> None:
    import errno

    with pytest.raises(OutputError, match="cannot be written") as caught, staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "bytes free" in caught.value.found
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "of another kind")
    assert os.listdir(tmp_path) == []
