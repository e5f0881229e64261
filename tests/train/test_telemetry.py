"""Metrics of a run can be asked for while it trains, and nobody answers afterwards."""

import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import TrainerCallback

from gazelle import SFTConfig, SFTTrainer
from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.data.profile import Profile
from gazelle.models.record import read_record


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Scraper(TrainerCallback):
    """Asks as Prometheus does, in the middle of the run."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            self.seen.append({sample.name: sample.value for family in families for sample in family.samples})


def test_a_run_is_watched(quick: Callable[..., SFTTrainer]) -> None:
    port = free_port()
    scraper = Scraper(port)
    trainer = quick(metrics_port=port)
    trainer.add_callback(scraper)
    trainer.train()
    assert [seen["gazelle_train_step"] for seen in scraper.seen] == [0, 1, 2]  # asked before the gauge is moved
    assert all(seen["gazelle_train_steps_planned"] == 3 for seen in scraper.seen)
    # What was logged after a step is there at the end of the next one.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [seen["gazelle_train_loss"] for seen in scraper.seen[1:]] == pytest.approx(losses[:2])
    assert scraper.seen[-1]["gazelle_train_tokens_per_second"] > 0
    assert scraper.seen[-1]["gazelle_process_memory_bytes"] > 1e8
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(scraper.url, timeout=5)


def test_a_run_that_fails_frees_the_port(quick: Callable[..., SFTTrainer]) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("on purpose")

    port = free_port()
    trainer = quick(metrics_port=port)
    trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_told(quick: Callable[..., SFTTrainer], tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (-1, 65536, "80", True):
        with pytest.raises(OptionError, match="metrics_port"):
            SFTConfig(metrics_port=wrong)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match="cannot be served"):
            quick(metrics_port=port).train()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("model: {name: nowhere}\ndata: {train: rows.jsonl}\n")
        assert main(["train", str(recipe), "--metrics-port", str(port)]) == 2
        assert "metrics_port" in capsys.readouterr().err  # and not that the model is nowhere
        assert main(["train", str(recipe), f"train.metrics_port={port}"]) == 2
        assert "metrics_port" in capsys.readouterr().err
        assert main(["train", str(recipe), "--metrics-port", str(port), "--print-recipe"]) == 0
        assert f"metrics_port: {port}" in capsys.readouterr().out
        for wrong in ("70000", "-1", "x"):
            assert main(["train", str(recipe), f"train.metrics_port={wrong}"]) == 2
            assert "metrics_port" in capsys.readouterr().err


def test_a_profile_of_the_data_lies_beside_the_adapter(quick: Callable[..., SFTTrainer], tmp_path: Path) -> None:
    trainer = quick()
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    run = read_record(tmp_path / "adapter")["run"]
    profile = Profile.from_dict(run["profile"])
    examples = trainer.prepared.train.examples
    assert sum(profile.counts["answer_length"]) == len(examples)
    assert sum(profile.counts["answer_tokens"]) == sum(label != -100 for row in examples for label in row.labels)
    assert (tmp_path / "adapter/gazelle.json").stat().st_size < 30_000
