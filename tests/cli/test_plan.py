"""`gazelle plan`, on folders that hold a config and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, OlmoConfig

from gazelle.__main__ import main
from gazelle.facade.planning import plan_model

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = {"activations", "embedding and head", "norms, positions and the rest", "weights of the layers",
         "trained parameters and gradients", "optimizer"}
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 32000,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
                         "tie_word_embeddings": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def plan(folder: Path, *options: str) -> int:
    return main(["plan", str(folder), "--seq", "64", *options])


def sizes(printed: str) -> dict[str, float]:
    """GB of each part."""
    return {name.strip(): float(size) for name, size in re.findall(r"^  (\S.*?) +([\d.]+) GB$", printed, re.MULTILINE)}


def test_peak_by_part_and_what_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--batch", "3") == 0
    printed = capsys.readouterr().out
    assert f"{folder}: 192 tokens a micro-batch, budget " in printed
    found = sizes(printed)
    peak = found.pop("peak")
    assert found.keys() == PARTS
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(peak, abs=0.005 * len(PARTS) + 0.005)
    assert found["embedding and head"] == round(2 * 32000 * 256 * 4 / 1e9, 2)
    assert "6 layers keep everything." in printed
    assert re.search(r"A micro-batch would take [\d.]+ s, [\d,]+ tokens/s, going by one layer measured on", printed)
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("choice", "said"), [
    ("auto", "6 layers keep everything"), ("false", "6 layers keep everything"),
    ("true", "6 layers make everything again"), ("offload", "6 layers make everything again"),
    ("unsloth", "6 layers keep everything"),
])
def test_a_choice_for_all_layers(choice: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--checkpointing", choice) == 0
    assert said in capsys.readouterr().out


def test_a_budget_that_is_too_small(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--budget", "30MB") == 2
    said = capsys.readouterr().err
    assert "--budget" in said and "memory_budget" not in said and "to do:" in said and "Traceback" not in said
    named = re.search(r"at least ([\d.]+ GB)", said)
    assert named is not None
    assert plan(folder, "--budget", named[1]) == 0
    assert f"budget {named[1]}" in capsys.readouterr().out


def test_a_budget_decides_what_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"tokens_a_row": 64, "rows": 2}
    most, least = (plan_model(str(folder), checkpointing=choice, **options).plan.peak for choice in (False, True))
    assert least < most
    assert plan(folder, "--budget", f"{(most + least) / 2e9:.5f}GB") == 0
    printed = capsys.readouterr().out
    assert "again" in printed
    assert sizes(printed)["peak"] <= round((most + least) / 2e9, 2)


@pytest.mark.parametrize(("options", "said"), [
    (["--budget", "lots"], "12GB"), (["--optim", "adamw_9bit"], "adamw_8bit"), (["--precision", "fp9"], "did you mean"),
    (["--precision", "fp8"], "Ada or newer (compute capability 8.9)"), (["--checkpointing", "maybe"], "offload"),
    (["--load-in-4bit", "--load-in-8bit"], "4 bits or in 8"), (["--full", "--load-in-4bit"], "full_finetuning"),
    (["--seq", "0"], "positive"), (["--batch", "0"], "--batch"), (["--r", "0"], "--r"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_training_would_refuse_is_refused(options: list[str], said: str, folder: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, *options) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed


@pytest.mark.parametrize("config", [
    OlmoConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=300),
    GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300),
    LlamaConfig(**SIZES | {"hidden_act": "relu", "vocab_size": 300}),
], ids=["olmo", "gpt2", "odd llama"])
def test_models_that_the_engine_does_not_run(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.save_pretrained(tmp_path)
    assert plan(tmp_path) == 2
    said = capsys.readouterr().err
    reason = "activation relu" if config.model_type == "llama" else f"does not know {config.model_type}"
    assert str(tmp_path) in said and reason in said and "estimate" in said


def test_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path / "nowhere") == 2
    assert "no model at this path" in capsys.readouterr().err
    assert plan(tmp_path) == 2
    assert "not a model" in capsys.readouterr().err
