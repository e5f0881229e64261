"""Whatever happens while an export is written, the earlier one is untouched, and the message says what is missing."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
from benchmarks.kill import judge, kill_runs, read, small_model, small_tokenizer

from gazelle.base.errors import OutputError
from gazelle.export.gguf import export_gguf
from gazelle.models.save import save_merged

pytestmark = pytest.mark.usefixtures("one_thread")
WRITERS = {
    "merged": lambda model, folder: save_merged(model, small_tokenizer(), folder / "out", dtype="float32"),
    "gguf": lambda model, folder: export_gguf(model, small_tokenizer(), folder / "out", "f32,f16"),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def test_killed_at_any_moment():
    """A few runs; `python -m benchmarks.kill` makes many."""
    assert sum(kill_runs(6)["left"].values()) == 6


@pytest.mark.slow
def test_killed_at_any_moment_many_times():
    kill_runs(200, seed=1)


def test_the_judge_sees_halves():
    old, new = ({f"merged/{name}": bytes([number]) for name in "ab"} | {"gguf/c": bytes([number])} for number in (1, 2))
    assert judge(old, old, new) == "old" and judge(old | {"gguf/c": b"\2"}, old, new) == "both"
    for broken in (old | {"merged/a": b"\2"}, old | {"gguf/c": b"\1\2"}, {"merged/a": b"\1"}, new | {"merged/d": b"x"}):
        with pytest.raises(AssertionError):
            judge(broken, old, new)


def test_a_limit_on_files(write, tmp_path):
    """As `ulimit -f` sets it, and disks that fill up while writing behave the same."""
    write(small_model(1), tmp_path)
    before = read(tmp_path)
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, earlier[1]))
    try:
        with pytest.raises(OutputError) as caught:
            write(small_model(2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert any(text in caught.value.found for text in ("File too large", "cut short"))
    assert "bytes free" in caught.value.found
    assert caught.value.fix
    assert read(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True,
                             check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix", reason="mount")
def test_a_full_disk(write, small_disk, monkeypatch):
    write(small_model(1), small_disk)
    before = read(small_disk)
    (small_disk / "other").write_bytes(bytes(_free(small_disk) - 300_000))
    with pytest.raises(OutputError, match="not enough disk space") as caught:
        write(small_model(2), small_disk)
    assert "bytes free" in caught.value.found and caught.value.expected.endswith("bytes")
    monkeypatch.setattr("gazelle.models.save.check_space", lambda *_: None)  # somebody else fills it meanwhile
    monkeypatch.setattr("gazelle.export.gguf.check_space", lambda *_: None)
    with pytest.raises(OutputError) as caught:
        write(small_model(2), small_disk)
    assert any(text in caught.value.found for text in ("No space left on device", "cut short"))
    assert {name: data for name, data in read(small_disk).items() if name != "other"} == before


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def test_a_read_only_disk(write, small_disk):
    write(small_model(1), small_disk)
    before = read(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(OutputError, match="cannot be written to") as caught:
            write(small_model(2), small_disk)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert "Read-only" in caught.value.found
    assert read(small_disk) == before
