"""The table of formats: what may be typed, where it goes, and each row written and read by its consumer."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tests.export.conftest import byte_level
from tests.llama import FOLDER, library
from tests.models.families import make

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.facade.exporting import parse_targets
from gazelle.facade.formats import _check_no_model
from gazelle.facade.language_model import FastLanguageModel
from gazelle.models.record import record_base
from gazelle.models.save import save_merged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it, with its record, and the rows it was trained on."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 384}
    save_merged(make("llama", 1, **sizes).eval(), byte_level(), tmp_path / "base", dtype="float32")
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    rows = [{"instruction": f"add {n}", "output": f"the cat sat on {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.save_pretrained(str(tmp_path / "run"))
    tokenizer.save_pretrained(str(tmp_path / "run"))
    model.gazelle_run = {"train": str(tmp_path / "rows.jsonl"), "format": "alpaca", "facts": [["optimizer steps", "3"]]}
    record_base(model, tmp_path / "run")
    return tmp_path / "run"


def test_what_may_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    found = parse_targets("run", ["gguf:Q4_K_M", "merged", "merged:lora", "gguf:q8_0", "GGUF:q8_0", "vllm:awq"])
    assert [(target.label, target.folder.name) for target in found] == [
        ("gguf:q4_k_m,q8_0", "run-gguf"), ("merged:16bit", "run-merged"), ("merged:lora", "run-merged-lora"),
        ("vllm:awq", "run-vllm-awq")]
    assert [target.folder for target in parse_targets("run", ["merged", "onnx"], Path("out"))] \
        == [Path("out/merged"), Path("out/onnx")]
    assert parse_targets("run", ["merged:merged_16bit"], Path("out"))[0].folder == Path("out")
    assert parse_targets("org/name", ["gguf"])[0].folder == tmp_path / "name-gguf"


@pytest.mark.parametrize(("to", "says"), [
    ("ggufs", "did you mean 'gguf'"), ("merged:16bits", "did you mean '16bit'"),
    ("gguf:q4_km", "did you mean 'q4_k_m'"),
    ("merged:16bit,lora", "--to merged:16bit --to merged:lora"), ("gguf-lora:q8_0", "write --to gguf-lora"),
    ("merged:", "written in one way"),
])
def test_what_may_not(to, says, tmp_path):
    if to == "merged:":
        assert parse_targets(str(tmp_path), [to])[0].ways == ["16bit"]
        return
    with pytest.raises(OptionError) as caught:
        parse_targets(str(tmp_path), [to])
    assert says in caught.value.fix


def test_programs_to_verify_with_are_not_passed_over(tmp_path, capsys):
    for option in ("--llama", "--vllm"):
        assert main(["export", str(tmp_path), "--to", "gguf", option, "/usr"]) == 2
        assert "add --verify" in capsys.readouterr().err


def test_formats_of_one_model_in_one_call(run, capsys):
    """Loaded once, written and read: GGUF by llama.cpp, with the adapter apart too, ONNX by onnxruntime."""
    library()
    assert main(["export", str(run), "--to", "gguf-lora", "--to", "ollama:f16", "--to", "onnx", "--verify", "--llama",
                 str(FOLDER)]) == 0
    printed = capsys.readouterr()
    assert "onnx:float32" in printed.out and "onnxruntime" in printed.out
    wanted = {"run-gguf-lora/adapter.verification.json": "llama.cpp",
              "run-ollama/model-F16.verification.json": "llama.cpp", "run-onnx/verification.json": "onnxruntime"}
    for name, consumer in wanted.items():
        found = json.loads((run.parent / name).read_text())
        checks = {check["name"]: check for check in found["checks"]}
        assert found["consumer"].startswith(consumer) and found["wrong"] == [], name
        assert found["source"].endswith("rows.jsonl")
        assert checks["greedy answers"]["values"]["same"] >= 3, name  # llama.cpp keeps keys in float16
        assert checks["error of logits"]["values"]["largest"] < (1e-3 if consumer == "onnxruntime" else 6e-2), name
    card = ModelCard.load(run.parent / "run-ollama" / "README.md")
    assert card.data.library_name == "gguf" and "| optimizer steps | 3 |" in card.text
    assert (run.parent / "run-ollama" / "Modelfile").exists() and "ollama create run-ollama -f Modelfile" in card.text
    card = ModelCard.load(run.parent / "run-gguf-lora" / "README.md")
    assert card.data.library_name == "gguf" and "lora" in card.data.tags
    assert "llama-cli -m base-model.gguf --lora adapter.gguf" in card.text and "A LoRA adapter as GGUF" in card.text
    assert list(run.parent.glob("**/.*")) == []


def test_quantised_checkpoints_are_calibrated_on_the_rows_of_the_run(run, capsys):
    """And a second export replaces the first with card, report and verification in it."""
    for _ in range(2):
        assert main(["export", str(run), "--to", "vllm:gptq", "--verify"]) == 0
    folder = run.parent / "run-vllm-gptq"
    report = next(folder.rglob("save_report.json"))
    settings = json.loads(report.read_text())["settings"]
    assert settings["rows"] == 4
    found = json.loads((folder / "verification.json").read_text())
    assert found["consumer"].startswith("transformers") and "--vllm" in found["note"] and found["wrong"] == []
    assert "vLLM was not asked" in capsys.readouterr().out


def test_onnx_replaces_no_files_of_a_model(run, tmp_path, capsys):
    """And its config.json is that of weights in float32, also where the base was kept in four bits."""
    kept = {path: path.read_bytes() for path in (*run.iterdir(), *(tmp_path / "base").iterdir())}
    for folder in (run, tmp_path / "base"):
        assert main(["export", str(run), "--to", "onnx", "-o", str(folder)]) == 2
        assert "which would be replaced" in capsys.readouterr().err
    record = json.loads((run / "gazelle.json").read_text()) | {"load_in_4bit": True}
    (run / "gazelle.json").write_text(json.dumps(record))
    assert main(["export", str(run), "--to", "onnx"]) == 0
    _check_no_model(tmp_path / "run-onnx", {"config.json", "tokenizer.json"})  # an earlier export is replaced
    config = json.loads((tmp_path / "run-onnx" / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert all(path.read_bytes() == content for path, content in kept.items() if path.name != "gazelle.json")


def test_a_card_of_ones_own_is_not_lost(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "gguf:f16"]) == 0
    card = tmp_path / "run-gguf" / "README.md"
    card.write_text("mine")
    assert main(["export", str(run), "--to", "gguf:f16"]) == 0
    assert card.read_text() == "mine"
    assert main(["export", str(run), "--to", "merged"]) == 0
    (tmp_path / "run-merged" / "README.md").write_text("mine")
    assert main(["export", str(run), "--to", "merged"]) == 2
    assert "other files, which would be lost" in capsys.readouterr().err


def test_a_run_leaves_a_card_and_a_later_one_renews_it(run, tmp_path, capsys):
    import yaml

    recipe = {"model": {"name": str(tmp_path / "base"), "max_seq_length": 64, "load_in_4bit": False},
              "lora": {"r": 2}, "data": {"train": str(tmp_path / "rows.jsonl")},
              "train": {"max_steps": 1, "report": False, "disable_tqdm": True, "save_strategy": "no"},
              "output_dir": str(tmp_path / "out")}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    for rank in (2, 3):
        assert main(["train", str(tmp_path / "my.yaml"), f"lora.r={rank}", "--overwrite"]) == 0
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.library_name == "peft" and f"r={rank}" in card.text and "rows.jsonl" in card.text


def test_what_came_before_an_error_is_shown(run, tmp_path, capsys):
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--to", "gguf:f16", "--to", "merged", "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert str(tmp_path / "out" / "gguf" / "model-F16.gguf") in printed.out
    assert "other files, which would be lost" in printed.err
