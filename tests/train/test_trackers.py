"""Trackers, offline, read back with their own readers: names of figures, settings without secrets, one run after a
resume, nothing sent."""

import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gazelle import SFTConfig, SFTTrainer
from gazelle.base.errors import MissingDependencyError, OptionError
from gazelle.train.trackers import check_trackers

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = "hf_nobodymayseethis"
FIGURES = {"train/loss", "train/learning_rate", "train/tokens_per_second", "eval/loss", "eval/perplexity", "eval/chrf"}


@pytest.fixture(autouse=True)
def loopback_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Records where this process connects to, and lets it go no farther than this machine."""
    outside: list[Any] = []
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
            outside.append(address)
            raise OSError(f"not allowed: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket.socket, "connect_ex", checked)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield outside
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    assert outside == []


@pytest.fixture
def two_parts(quick: Callable[..., SFTTrainer], tmp_path: Path) -> Callable[[str], tuple[SFTTrainer, Path]]:
    """Trains three steps, then goes on from the second: as after a kill between step three and its checkpoint."""

    def run(tracker: str) -> tuple[SFTTrainer, Path]:
        options = {"report_to": tracker, "hub_token": SECRET, "save_strategy": "steps", "save_steps": 2, "max_steps": 3,
                   "eval_strategy": "steps", "eval_steps": 1, "eval_generate": ["chrf"], "eval_max_new_tokens": 2}
        quick(**options).train()
        trainer = quick(**options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        return trainer, tmp_path / "out"

    return run


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_tensorboard(two_parts: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, folder = two_parts("tensorboard")
    runs = list((folder / "runs").iterdir())
    assert [path.name for path in runs] == [trainer.args.run_name] and trainer.args.run_name.startswith("out-")
    events = EventAccumulator(str(runs[0]), purge_orphaned_data=True).Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    logged = events.Scalars("train/loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert [event.value for event in logged] == pytest.approx(losses(folder), rel=1e-6)
    settings = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert settings["hub_token"] is None and settings["eval_generate"] == ["chrf"]
    assert any(name.startswith("plan/") for name in settings)
    no_secret(tmp_path)


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: a log in LevelDB's format, behind seven bytes of its own. wandb's reader is no more
    Python, its messages are."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb(two_parts: Any, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    trainer, folder = two_parts("wandb")
    assert wandb.run.settings.mode == "offline" and wandb.run.name == trainer.args.run_name
    wandb.finish()
    ids, figures, settings, steps = set(), set(), {}, []
    for path in tmp_path.rglob("*.wandb"):
        for record in wandb_records(path):
            if record.run.run_id:
                ids.add(record.run.run_id)
            found = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            figures |= found.keys()
            steps += [found["train/global_step"]] if "train/loss" in found else []
            for item in [*record.config.update, *record.run.config.update]:
                settings[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert ids == {json.loads((folder / "tracking.json").read_text())["id"]}
    assert figures >= FIGURES and {1, 2, 3} == set(steps)
    assert settings["hub_token"] is None and any(name.startswith("plan/") for name in settings)
    no_secret(tmp_path)


def test_mlflow(two_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trainer, folder = two_parts("mlflow")
    client = MlflowClient((tmp_path / "store").as_uri())
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1 and runs[0].info.run_name == trainer.args.run_name
    assert {"loss", "eval_loss", "eval_perplexity", "eval_chrf"} <= runs[0].data.metrics.keys()
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert {event.step for event in history} == {1, 2, 3}
    assert {event.value for event in history} == set(losses(folder))
    assert runs[0].data.params["hub_token"] == "None"
    assert any(name.startswith("plan/") for name in runs[0].data.params)
    no_secret(tmp_path)


def test_trackio(two_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer, folder = two_parts("trackio")
    assert SQLiteStorage.get_runs("huggingface") == [trainer.args.run_name]
    logged = SQLiteStorage.get_logs("huggingface", trainer.args.run_name)
    assert {name for entry in logged for name in entry} >= FIGURES
    assert {entry["train/loss"] for entry in logged if "train/loss" in entry} == set(losses(folder))
    config = SQLiteStorage.get_run_config("huggingface", trainer.args.run_name)
    assert config["hub_token"] is None
    no_secret(tmp_path)


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"),
                                             ("trackio", "trackio")])
def test_a_missing_package_is_said_before_anything(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install gazelle\[{extra}\]"):
        SFTConfig(report_to=name)


@pytest.mark.parametrize(("key", "machine", "mode"), [("", "", "offline"), ("k", "", None), ("", "api.wandb.ai", None),
                                                      ("", "elsewhere.example", "offline")])
def test_wandb_stays_offline_without_a_key(key: str, machine: str, mode: str | None, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    if machine:
        (tmp_path / "netrc").write_text(f"machine {machine} login user password p\n")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    check_trackers("wandb")
    assert os.environ.get("WANDB_MODE") == mode


def test_a_second_run_of_a_trainer_is_another_one(quick: Callable[..., SFTTrainer], tmp_path: Path) -> None:
    trainer = quick(report_to="tensorboard")
    trainer.train()
    first = trainer.args.run_name
    trainer.train()
    assert trainer.args.run_name != first and len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_an_unknown_tracker() -> None:
    with pytest.raises(OptionError, match="no such place to report to"):
        SFTConfig(report_to=["wandbb"])
