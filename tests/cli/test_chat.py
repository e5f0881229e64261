"""`gazelle chat` answers with the weights that were trained."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitsandbytes.nn import Linear4bit

from gazelle import FastLanguageModel
from gazelle.__main__ import main


@pytest.mark.parametrize("four", [False, True])
def test_the_base_is_kept_as_it_was_in_training(
    four: bool, demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_gguf), load_in_4bit=four)
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    loaded = []
    original: Callable[[Any], Any] = FastLanguageModel.for_inference
    monkeypatch.setattr(FastLanguageModel, "for_inference", lambda model: loaded.append(model) or original(model))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n\n/new\n/exit\nnever asked\n"))
    capsys.readouterr()
    assert main(["chat", str(tmp_path / "lora"), "--max-new-tokens", "12"]) == 0
    assert any(isinstance(module, Linear4bit) for module in loaded[0].modules()) is four
    assert "Paris" in capsys.readouterr().out


def test_temperature_and_length_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "x", "--max-new-tokens", "0"]) == 2
    assert main(["chat", "x", "--temperature", "-1"]) == 2
