"""What users get wrong, through the command line: one clear message, exit code 2, no traceback, nothing written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from gazelle.__main__ import main

GOOD = '{"instruction": "Who runs the mill?", "output": "Mrs. Okonkwo runs the mill."}\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A small sound checkpoint in two shards, with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ))
    model.save_pretrained(folder, max_shard_size="8MB")
    demo_tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Case:
    """One mistake: how to make it, and what the message must say."""

    name: str
    says: tuple[str, ...]
    rows: str | bytes | None = GOOD
    file: str = "rows.jsonl"
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def break_model(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model")


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def truncate(model: Path) -> None:
    path = shards(model)[-1]
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(model: Path) -> None:
    for path in [*shards(model), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def put_nan(model: Path) -> None:
    path = shards(model)[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return change


def drop_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit_json("tokenizer_config.json", chat_template=None)(model)
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|nothing|>"))
    edit_json("tokenizer_config.json", bos_token="<|nothing|>")(model)


def drop_eos(model: Path) -> None:
    edit_json("tokenizer_config.json", eos_token=None)(model)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    edit_json("config.json", eos_token_id=None)(model)
    edit_json("generation_config.json", eos_token_id=None)(model)


def adapter_for_another_base(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    base.config.name_or_path = str(folder / "model")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_model.safetensors"
    wider = {name: torch.zeros(tensor.shape[0], tensor.shape[1] + 8) for name, tensor in load_file(path).items()}
    save_file(wider, path)


def used_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "adapter_model.safetensors").write_bytes(b"an earlier run")


LONG = json.dumps({"instruction": "word " * 90, "output": "never reached"}) + "\n"

CASES = [
    # data
    Case("empty file", ("rows.jsonl",), rows=""),
    Case("missing file", ("no such file", "rows.jsonl"), rows=None),
    Case("missing file, near miss", ("did you mean", "rows.json"), file="rows.json",
         overrides=("data.train=rows.jsno",), rows="[" + GOOD + "]"),
    Case("wrong columns", ("frage", "instruction"), rows='{"frage": "a", "antwort": "b"}\n'),
    Case("mixed schemas", ("line 2", "alpaca"), rows=GOOD + '{"messages": [{"role": "user", "content": "a"}]}\n'),
    Case("bad JSON line", ("line 2", "JSON"), rows=GOOD + '{"instruction": "a" "output": "b"}\n'),
    Case("bad JSON file", ("rows.json", "line 2"), file="rows.json", rows='[{"instruction": "a",\n"output" "b"}]'),
    Case("not UTF-8", ("line 2", "UTF-8"), rows=GOOD.encode() + b'{"instruction": "caf\xe9", "output": "b"}\n'),
    Case("null answer", ("line 2", "output"), rows=GOOD + '{"instruction": "a", "output": null}\n'),
    Case("empty answer", ("line 1", "output"), rows='{"instruction": "a", "output": " "}\n'),
    Case("number for a text", ("line 1", "output"), rows='{"instruction": "a", "output": 7}\n'),
    Case("unknown role", ("line 1", "asistant"),
         rows='{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}\n'),
    Case("no assistant turn", ("line 1", "assistant"), rows='{"messages": [{"role": "user", "content": "a"}]}\n'),
    Case("no messages", ("line 1", "messages"), rows='{"messages": []}\n'),
    Case("everything truncated away", ("max_length", "64"), rows=LONG, overrides=("model.max_seq_length=64",)),
    Case("ragged CSV", ("rows.csv", "line 3"), file="rows.csv", rows="instruction,output\na,b\na,b,c\n"),
    Case("unknown file type", ("rows.xyz",), file="rows.xyz"),
    Case("unknown format", ("alpacca", "did you mean"), overrides=("data.format=alpacca",)),
    Case("column map to nowhere", ("frage",), overrides=("data.columns={instruction: frage}",)),
    Case("nothing to hold out", ("eval_split 0.1 of 1 rows",), overrides=("data.eval_split=0.1",)),
    # the checkpoint
    Case("no such model", ("nowhere",), overrides=("model.name=./nowhere",)),
    Case("not a model folder", ("config.json",), prepare=break_model(lambda m: (m / "config.json").unlink())),
    Case("missing shard", ("safetensors",), prepare=break_model(lambda m: shards(m)[-1].unlink())),
    Case("truncated shard", ("safetensors", "bytes"), prepare=break_model(truncate)),
    Case("pickle checkpoint", ("pytorch_model.bin", "safetensors"), prepare=break_model(to_pickle)),
    Case("NaN weights", ("weight", "NaN"), prepare=break_model(put_nan)),
    Case("no chat template", ("template",), prepare=break_model(drop_template)),
    Case("no EOS token", ("end-of-sequence", "eos_token"), prepare=break_model(drop_eos)),
    Case("unknown template", ("chatml",), overrides=("data.chat_template=chatlm",)),
    Case("adapter for another base", ("adapter",), overrides=("model.name=adapter",), prepare=adapter_for_another_base),
    # options
    Case("no GPU where one was asked for", ("cuda",), overrides=("model.device_map=cuda:7",)),
    Case("bad device", ("gpu0",), overrides=("model.device_map=gpu0",)),
    Case("bad recipe value", ("train.learning_rate", "fast"), overrides=("train.learning_rate=fast",)),
    Case("negative learning rate", ("learning_rate", "above 0"), overrides=("train.learning_rate=-1",)),
    Case("bad recipe key", ("lerning_rate", "did you mean 'learning_rate'"), overrides=("train.lerning_rate=1",)),
    Case("unknown target module", ("query", "q_proj"), overrides=("lora.target_modules=[query]",)),
    Case("layer out of range", ("layers_to_transform", "9"), overrides=("lora.layers_to_transform=[9]",)),
    Case("4 and 8 bits", ("8", "4"), overrides=("model.load_in_4bit=true", "model.load_in_8bit=true")),
    Case("unknown optimizer", ("optim", "adamw"), overrides=("train.optim=adamm",)),
    Case("unknown schedule", ("lr_scheduler_type", "did you mean 'cosine'"),
         overrides=("train.lr_scheduler_type=cosinus",)),
    Case("evaluation without rows", ("eval_strategy", "data.eval"), overrides=("train.eval_strategy=epoch",)),
    Case("nowhere to report to", ("report_to", "nope"), overrides=("train.report_to=nope",)),
    Case("a package that is not there", ("wandb", "pip install"), overrides=("train.report_to=wandb",)),
    Case("no such metric", ("metric_for_best_model", "eval_loss"), overrides=("train.metric_for_best_model=acuracy",)),
    Case("quantised without an adapter", ("without an adapter",),
         overrides=("lora=null", "model.load_in_4bit=true")),
    Case("longer than the model takes", ("max_length", "256"), overrides=("train.max_length=4096",)),
    # the output folder
    Case("the model's own folder", ("the model's own",), overrides=("output_dir=model",)),
    Case("read-only output folder", ("/proc/out",), overrides=("output_dir=/proc/out",)),
    Case("output path through a file", ("rows.jsonl",), overrides=("output_dir=rows.jsonl/out",)),
    Case("used output folder", ("--overwrite",), prepare=used_folder),
    Case("resume without a checkpoint", ("checkpoint",), overrides=("--resume",)),
]


def modes(place: Path) -> set[int]:
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return {path.stat().st_mode & 0o777 for path in files}


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_clear_message_and_nothing_written(
    case: Case, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "model")
    if case.rows is not None:
        (tmp_path / case.file).write_bytes(case.rows if isinstance(case.rows, bytes) else case.rows.encode())
    recipe = {"model": {"name": "model", "max_seq_length": 256, "load_in_4bit": False}, "lora": {"r": 2},
              "data": {"train": case.file}, "train": {"max_steps": 1, "report": False}, "output_dir": "out"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    case.prepare(tmp_path)
    before = snapshot(tmp_path)
    capsys.readouterr()

    assert main(["train", "recipe.yaml", *case.overrides]) == 2

    printed = capsys.readouterr().err
    message = printed[printed.index("error: ") :]
    for words in case.says:
        assert words in message
    assert "to do:" in message
    assert "Traceback" not in printed
    assert snapshot(tmp_path) == before


def test_the_same_recipe_without_a_mistake_trains(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the table could pass because of a mistake that all its recipes share."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(GOOD)
    recipe = {"model": {"name": str(checkpoint), "max_seq_length": 256, "load_in_4bit": False}, "lora": {"r": 2},
              "data": {"train": "rows.jsonl"}, "train": {"max_steps": 1, "report": False}, "output_dir": "out"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert modes(tmp_path / "out") == modes(tmp_path / "rows.jsonl")


def test_overwriting_leaves_one_run_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full checkpoint beside an adapter would load as neither; a file of the user's stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(GOOD)
    recipe = {"model": {"name": str(checkpoint), "max_seq_length": 256, "load_in_4bit": False}, "lora": None,
              "data": {"train": "rows.jsonl"}, "output_dir": "out",
              "train": {"max_steps": 2, "report": False, "save_strategy": "steps", "save_steps": 1}}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "full.yaml"]) == 0
    assert (tmp_path / "out/model.safetensors").exists()
    assert modes(tmp_path / "out") == modes(tmp_path / "rows.jsonl")  # weights and checkpoints for all to read
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe | {"lora": {"r": 2}}))
    assert main(["train", "lora.yaml", "train.save_strategy=no", "--dry-run"]) == 0
    assert main(["train", "lora.yaml", "train.save_strategy=no"]) == 2
    assert main(["train", "lora.yaml", "train.save_strategy=no", "--overwrite"]) == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "notes.txt"} <= left
    assert not left & {"model.safetensors", "config.json", "checkpoint-1", "checkpoint-2"}
