"""Checkpoints on disk: whole or not there, whatever happens."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from gazelle.base.errors import OptionError, OutputError
from gazelle.train import checkpoint
from gazelle.train.checkpoint import checkpoints, fault, find_checkpoint, recover, rotate, staged_checkpoint
from gazelle.train.state_file import read_state, write_state

ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, step: int, size: int = 1000) -> Path:
    target = folder / f"checkpoint-{step}"
    with staged_checkpoint(target, size) as staging:
        (staging / "trainer_state.json").write_text(json.dumps({"step": step}))
        (staging / "inner").mkdir()
        (staging / "inner" / "adapter_model.safetensors").write_bytes(bytes([step]) * size)
    return target


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    target = write(tmp_path, 3)
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        "trainer_state.json": 11, "inner/adapter_model.safetensors": 1000}
    assert fault(target) is None and fault(target, thorough=False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    (tmp_path / "ordinary").mkdir()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "trainer_state.json").unlink(), "No such file"),
        (lambda path: (path / "trainer_state.json").write_text('{"step": 4}'), "not what was written"),
        (lambda path: (path / "trainer_state.json").write_text(""), "0 bytes instead of 11"),
        (lambda path: (path / "manifest.json").unlink(), "never finished"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text() + " "), "not what"),
        (lambda path: shutil.copytree(path, path.with_name("checkpoint-9")), "it is of step 3"),
    ],
)
def test_damage_is_named(harm: object, said: str, tmp_path: Path) -> None:
    target = write(tmp_path, 3)
    harm(target)  # type: ignore[operator]
    assert said in str(fault(max(checkpoints(tmp_path), key=lambda path: path.name)))


def test_the_newest_that_verifies_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write(tmp_path, step) for step in (10, 20, 9)]  # a new run in an old folder starts below it
    assert find_checkpoint(True, str(tmp_path)) == paths[2]
    (paths[2] / "trainer_state.json").write_text("x")
    (paths[1] / "inner" / "adapter_model.safetensors").write_bytes(b"\1" * 1000)
    assert find_checkpoint(True, str(tmp_path), thorough=False) == paths[1]
    caplog.clear()
    assert find_checkpoint(True, str(tmp_path)) == paths[0]
    assert "Skipped" in caplog.text and f"{paths[2]}: trainer_state.json has 1 bytes" in caplog.text
    assert f"{paths[1]}: inner/adapter_model.safetensors is not what was written" in caplog.text
    with pytest.raises(OptionError) as caught:
        find_checkpoint(str(paths[1]), "elsewhere")
    assert "is not what was written" in caught.value.found and str(paths[0]) in caught.value.fix
    (paths[0] / "manifest.json").unlink()
    with pytest.raises(OptionError, match="no checkpoint here is whole") as caught:
        find_checkpoint(True, str(tmp_path))
    assert all(path.name in str(caught.value.found) or "…" in str(caught.value.found) for path in paths)
    with pytest.raises(OptionError, match="no checkpoint to resume from"):
        find_checkpoint(True, str(tmp_path / "none"))
    assert find_checkpoint(False, str(tmp_path)) is None


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        target = write(tmp_path, step)
        rotate(tmp_path, 2, [target, tmp_path / "checkpoint-1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, None, [])
    rotate(tmp_path, 1, [tmp_path / "checkpoint-1"])
    assert len(checkpoints(tmp_path)) == 2


def test_what_killed_processes_leave_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".checkpoint-2.half").mkdir()
    (tmp_path / ".checkpoint-2.half" / "model.safetensors").write_text("half")
    write(tmp_path, 3).rename(tmp_path / ".checkpoint-3.abc")  # died between two renames
    write(tmp_path, 4).rename(tmp_path / ".checkpoint-4.gone.abc")  # died while rotating
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert fault(tmp_path / "checkpoint-3") is None


def test_what_somebody_else_called_so_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-best-1")
    (tmp_path / ".checkpoint-notes").mkdir()
    (tmp_path / ".checkpoint-9.txt").write_text("mine")
    recover(tmp_path)
    rotate(tmp_path, 1, [write(tmp_path, 2)])
    left = [".checkpoint-9.txt", ".checkpoint-notes", "checkpoint-2", "checkpoint-best-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_an_old_one_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    def refuses(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    paths = [write(tmp_path, step) for step in (1, 2)]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuses)
    rotate(tmp_path, 1, paths[1:])
    assert "checkpoint-1 could not be deleted" in caplog.text and "Permission denied" in caplog.text
    assert fault(paths[1]) is None


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = write(tmp_path, 1)
    before = (target / "manifest.json").read_text()
    with pytest.raises(KeyError), staged_checkpoint(target, 0):
        raise KeyError
    with pytest.raises(OutputError, match="could not be written"), staged_checkpoint(target, 0) as staging:
        (staging / "no" / "such").write_text("x")
    assert (target / "manifest.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    write(tmp_path, 1, 2000)  # the same step again
    assert fault(target) is None and (target / "inner" / "adapter_model.safetensors").stat().st_size == 2000


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage(5_000_000))
    with pytest.raises(OutputError, match="too full") as caught:
        write(tmp_path, 2, 80_000_000)
    error = caught.value
    assert (error.found, error.expected) == ("5 MB free", "80 MB")
    assert "checkpoint-1 is there to resume from" in error.fix and error.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("writer", ["bytes", "safetensors"])
def test_a_disk_that_fills_up_meanwhile(writer: str, tmp_path: Path) -> None:
    """A real write that fails halfway, as the process may not write more than 100 kB to a file."""
    write(tmp_path, 1)
    code = f"""
import resource, signal, sys
from pathlib import Path
from gazelle.train.checkpoint import staged_checkpoint
import torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from gazelle.base.errors import OutputError
try:
    with staged_checkpoint(Path({str(tmp_path)!r}) / "checkpoint-2", 1_000_000) as staging:
        if {writer!r} == "bytes":
            (staging / "trainer_state.json").write_bytes(bytes(1_000_000))
        else:
            save_file({{"a": torch.zeros(250_000)}}, staging / "trainer_state.safetensors")
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the disk is too full for a checkpoint" in done.stdout, done.stderr
    assert "expected: 1 MB" in done.stdout and "checkpoint-1 is there to resume from" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert fault(tmp_path / "checkpoint-1") is None


def test_states_come_back_to_the_bit(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    generator = np.random.RandomState(3)
    state = {"state": {0: {"step": 3, "exp_avg": torch.randn(3, 2).T, "q": torch.tensor([1, 255], dtype=torch.uint8)},
                       1: {"half": torch.randn(4, dtype=torch.bfloat16), "same": shared, "part": shared[2:]}},
             "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "params": [0, 1], "none": None, "fused": True}],
             "numpy": generator.get_state(), "odd": {"$tensor": "a name"}, "inf": float("inf"), "": {},
             "scalar": torch.tensor(2.5), "count": np.int64(7), "text": "$x"}
    write_state(tmp_path / "a.state", state)
    again = read_state(tmp_path / "a.state")
    assert torch.equal(again["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert again["state"][1]["half"].dtype == torch.bfloat16
    assert torch.equal(again["state"][1]["half"], state["state"][1]["half"])
    assert torch.equal(again["state"][1]["part"], shared[2:])
    assert again["state"][0]["q"].tolist() == [1, 255] and again["state"][0]["step"] == 3
    assert again["groups"] == state["groups"] and isinstance(again["groups"][0]["betas"], tuple)
    assert again["odd"] == state["odd"] and again["inf"] == float("inf") and again[""] == {} and again["count"] == 7
    assert again["scalar"].shape == () and again["scalar"] == 2.5 and again["text"] == "$x"
    other = np.random.RandomState(0)
    other.set_state(again["numpy"])
    assert other.randint(2**31, size=5).tolist() == generator.randint(2**31, size=5).tolist()
    with pytest.raises(TypeError, match=r"b\.x\.0 is a object"):
        write_state(tmp_path / "b", {"x": [object()]})
