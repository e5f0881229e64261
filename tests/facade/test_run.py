"""What `gazelle train` finds before it loads a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gazelle.__main__ import main
from gazelle.facade.language_model import FastLanguageModel


@pytest.fixture
def train(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a recipe for the demo model up to where its weights would be loaded, which raises KeyError."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Who?", "completion": f"Number {n}."}) + "\n" for n in range(4)))

    def loads(*_: Any, **__: Any) -> None:
        raise KeyError("weights are loaded")

    monkeypatch.setattr(FastLanguageModel, "from_pretrained", loads)

    def run(lora: dict[str, Any] | None = None, **options: Any) -> int:
        recipe = {"model": {"name": str(demo_gguf), "full_finetuning": lora is None}, "lora": lora,
                  "data": {"train": str(rows)}, "train": options, "output_dir": str(tmp_path / "out")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return main(["train", str(tmp_path / "recipe.yaml")])

    return run


@pytest.mark.parametrize("lora", [{"r": 8}, None], ids=["lora", "full"])
def test_a_budget_that_is_too_small(train: Callable[..., int], lora: dict[str, Any] | None, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert train(lora, memory_budget="100MB") == 2
    said = capsys.readouterr().err
    assert "memory_budget: no plan fits into the memory budget" in said
    assert "found:    0.1 GB" in said and "at least" in said and "per_device_train_batch_size" in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("options", [{"memory_budget": "64GB"}, {}, {"memory_budget": "100MB", "engine": False}],
                         ids=["enough", "no budget", "no engine"])
def test_what_fits_goes_on_to_the_weights(train: Callable[..., int], options: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="weights are loaded"):
        train({"r": 8}, **options)


def test_answers_are_graded_only_where_rows_are_held_out(train: Callable[..., int], tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("exact_match", ["exact_match", "contains"]):
        assert train({"r": 8}, eval_generate=asked) == 2
        said = capsys.readouterr().err
        assert "train.eval_generate: answers are to be graded" in said and "data.eval_split" in said
    assert train({"r": 8}, metric_for_best_model="exakt") == 2
    assert "metric_for_best_model: no such metric" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
