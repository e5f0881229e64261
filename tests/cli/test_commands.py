"""The commands that need no model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gazelle import __version__
from gazelle.__main__ import main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in ("demo", "train", "chat", "compare", "doctor", "recipes"):
        assert command in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gazelle {__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "--no-such-option"], ["chat"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_recipes_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert {"demo", "lora", "qlora"} <= {line.split(" ")[0] for line in listed.splitlines()}
    assert main(["recipes", "qlora"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["load_in_4bit"] is True
    assert main(["recipes", "qlorra"]) == 2
    assert "did you mean 'qlora'?" in capsys.readouterr().err


def test_print_recipe_shows_every_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: m}\ndata: {train: rows.jsonl}\n")
    assert main(["train", str(path), "lora.r=8", "--print-recipe"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lora"]["r"] == 8
    assert printed["data"]["train_on"] == "responses"


def test_doctor_really_runs_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "packed attention  ok (forward and backward ran on" in printed
    assert "NF4 storage       ok" in printed
    assert "baseline memory" in printed
    assert re.search(r"  compressed-tensors +(\d|not installed)", printed)
    assert "transformers" in printed


def test_python_m_gazelle_alone_is_the_check() -> None:
    done = subprocess.run([sys.executable, "-m", "gazelle"], capture_output=True, text=True, check=True)
    assert "packed attention  ok" in done.stdout
    assert "WRONG" not in done.stdout
