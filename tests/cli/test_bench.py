"""`gazelle bench`, on a tiny model with the demo's tokenizer; and the README's figures of speed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gazelle.__main__ import main
from gazelle.cli.bench import OURS, THEIRS, measure

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, demo_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=len(demo_tokenizer), tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("gazelle.cli.bench.demo_model", lambda: tmp_path / "model")


def test_both_train_the_same_model_on_the_same_rows() -> None:
    result = measure(rows=3, steps=4)
    assert result["largest_loss_difference"] < 1e-4
    assert result["speedup"] == result["median_seconds"][THEIRS] / result["median_seconds"][OURS]
    assert [len(result["all_seconds"][name]) for name in (OURS, THEIRS)] == [4, 4]
    assert result["tokens_per_second"][OURS] * result["median_seconds"][OURS] == pytest.approx(result["tokens_a_batch"])
    assert result["machine"]["versions"]["gazelle"]
    if sys.platform == "linux":
        assert all(memory > 0 for memory in result["step_memory_gb"].values())
    json.dumps(result)


def test_the_command_prints_a_table_and_writes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    assert main(["bench", "--rows", "2", "--steps", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "times as fast" in printed
    if sys.platform == "linux":
        assert printed.count(" GiB ") == 2  # 2**30 bytes
    assert json.loads(out.read_text())["rows_a_batch"] == 2


def test_json_alone_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rows", "1", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_a_place_that_cannot_be_written_to_ends_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file" / "bench.json")]) == 2
    assert "runs through a file" in capsys.readouterr().err


def test_the_readme_shows_the_result_files() -> None:
    from benchmarks.readme import speed_block

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- bench:begin -->\n{speed_block()}\n<!-- bench:end -->" in readme


def test_a_result_goes_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'bench.json'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_by_length_and_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.csv"
    model = str(tmp_path / "model")
    quick = ["--lengths", "8,12", "--batches", "2", "--warmup", "0", "--iterations", "1"]
    assert main(["bench", model, *quick, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 2 | ") == 2 and "tokens/s" in printed
    assert [line.split(",")[:2] for line in out.read_text().splitlines()] == [
        ["batch_size", "seq_length"], ["2", "8"], ["2", "12"]]
    assert main(["bench", model, *quick, "--no-train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["train_tokens_per_second"] is None
    assert main(["bench", model, *quick, "--out", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("options", "said"), [
    (["--lengths", "8;12"], "--lengths"), (["--out", "bench.xlsx"], ".json, .csv"), (["--dtype", "fp7"], "dtype"),
])
def test_mistakes_about_a_model(tmp_path: Path, options: list[str], said: str,
                                capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "model"), *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("options", "said"), [(["--dtype", "fp7"], "fp7"), (["--lengths", "0"], "--lengths")])
def test_mistakes_are_told_of_before_the_model_is_loaded(options: list[str], said: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no/such-model", *options]) == 2
    assert said in capsys.readouterr().err
