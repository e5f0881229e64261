"""What `prepare_for_vllm` writes: a checkpoint or an adapter, and the command that serves it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import gazelle
from gazelle import FastLanguageModel
from gazelle.base.errors import ModelError, OptionError, OutputError
from gazelle.export.vllm import export_vllm, serve_command
from gazelle.models.load import load_tokenizer

IDS = torch.tensor([[5, 9, 7, 200, 31]])
ROWS = [{"text": "the cat sat on the mat, and then it went away again. " * 4}] * 3
SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32}


@pytest.fixture
def base(model, tokenizer, tmp_path):
    folder = tmp_path / "base model"
    model("llama", **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(base):
    """A loaded model with an adapter away from zero."""
    def make(r=4, four=False, **options):
        loaded, _ = FastLanguageModel.from_pretrained(str(base), load_in_4bit=four, max_seq_length=96)
        model = FastLanguageModel.get_peft_model(loaded, r=r, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.1)
        return model.eval()
    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def options_of(command):
    """The folder, and the options by name."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    flags = [word for word in words[3:] if word.startswith("--")]
    return words[2], {flag: (words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("--") else True)
                      for flag in flags for at in [words.index(flag)]}


def run_script(folder, tmp_path):
    """What serve.sh gives to a `vllm` that only prints where it is and its arguments."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "vllm").write_text(f"#!{sys.executable}\nimport os, sys, json\n"
                                "print(json.dumps([os.getcwd(), sys.argv[1:]]))")
    (tools / "vllm").chmod(0o755)
    done = subprocess.run([str(folder / "serve.sh"), "--port", "81"], capture_output=True, text=True, check=True,
                          env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}, cwd="/")
    return json.loads(done.stdout)


def test_merged(adapted, tmp_path):
    model = adapted()
    command = gazelle.prepare_for_vllm(model, output_dir=tmp_path / "it's out", max_batch_size=5, dtype="bfloat16")
    folder, options = options_of(command)
    assert folder == str(tmp_path / "it's out")
    assert options == {"--dtype": "bfloat16", "--max-num-seqs": "5", "--max-model-len": "96", "--host": "127.0.0.1",
                       "--served-model-name": "it's out"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (logits(loaded) - logits(model)).norm() < 0.03 * logits(model).norm()
    where, arguments = run_script(Path(folder), tmp_path)
    assert where == folder
    assert arguments == [*shlex.split(command.replace(shlex.quote(folder), ".", 1))[1:], "--port", "81"]
    settings = json.loads((Path(folder) / "vllm.json").read_text())
    assert (settings["command"], settings["quantization"], settings["max-num-seqs"]) == (command, None, 5)
    # A second time it replaces the first.
    gazelle.prepare_for_vllm(model, tmp_path / "it's out", dtype=torch.float16)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16


@pytest.mark.parametrize("quantization", ["awq", "gptq", "fp8"])
def test_quantised(quantization, adapted, tmp_path):
    model, out = adapted(four=True), tmp_path / "out"
    files = export_vllm(model, load_tokenizer(str(tmp_path / "base model"))[0], out, quantization=quantization,
                        calibration=ROWS, max_batch_size=2)
    names = {path.name for path in files}
    assert {"serve.sh", "vllm.json", "config.json", "model.safetensors", "save_report.json", "tokenizer.json",
            "generation_config.json"} <= names
    assert all(path.parent == out and path.is_file() for path in files)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["dtype"] == "float16"
    report = json.loads((out / "save_report.json").read_text())
    assert report["method"] == quantization
    assert ("rows" in report["settings"]) == (quantization != "fp8")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(loaded) - logits(model)).norm() < 0.5 * logits(model).norm()
    assert json.loads((out / "vllm.json").read_text())["quantization"] == quantization


def test_an_adapter_by_itself(adapted, base, tmp_path):
    """On the folder that its base was loaded from, which stays where it is."""
    model, out = adapted(r=12, use_rslora=True), tmp_path / "out"
    command = gazelle.prepare_for_vllm(model, out, merge=False)
    folder, options = options_of(command)
    assert folder == str(base)
    assert options["--lora-modules"] == f"out={out / 'adapter'}"
    assert (options["--enable-lora"], options["--max-lora-rank"]) == (True, "16")
    assert options["--tokenizer"] == options["--generation-config"] == str(out / "adapter")
    assert not (out / "base").exists()
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
    where, arguments = run_script(out, tmp_path)
    assert (where, arguments[1]) == (str(out), str(base))
    assert "out=adapter" in arguments and Path(where, "adapter", "adapter_config.json").exists()
    gazelle.prepare_for_vllm(model, out, merge=False)
    with pytest.raises(OutputError):
        gazelle.prepare_for_vllm(model, out)
    (out / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="would be lost"):
        gazelle.prepare_for_vllm(model, out, merge=False)
    (out / "adapter" / "notes.txt").replace(out / "notes.txt")
    with pytest.raises(OutputError, match="would be lost"):
        gazelle.prepare_for_vllm(model, out, merge=False)


def test_an_adapter_with_the_base_it_was_trained_on(adapted, tmp_path):
    """A base in four bits is written as the numbers that it stands for."""
    model, out = adapted(four=True), tmp_path / "out"
    folder, options = options_of(gazelle.prepare_for_vllm(model, out, merge=False, dtype="float32"))
    assert folder == str(out / "base")
    assert options["--lora-modules"] == f"out={out / 'adapter'}" and "--tokenizer" not in options
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-3, rtol=1e-3)
    assert not model.get_base_model().model.layers[0].mlp.up_proj.disable_adapters
    where, arguments = run_script(out, tmp_path)
    assert (where, arguments[1]) == (str(out), "base")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 600}], ids=str)
def test_adapters_that_vllm_does_not_serve(options, adapted, tmp_path):
    model = adapted(**options)
    with pytest.raises(ModelError, match="vLLM") as caught:
        gazelle.prepare_for_vllm(model, tmp_path / "out", merge=False)
    assert "leave merge=False out" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_mistakes(adapted, base, tmp_path):
    model, out = adapted(), tmp_path / "out"
    for options, word in (({"quantization": "awk"}, "awq"), ({"max_batch_size": 0}, "at least 1"),
                          ({"dtype": "int8"}, "bfloat16"), ({"dtype": "float32", "quantization": "fp8"}, "float16")):
        with pytest.raises(OptionError) as caught:
            gazelle.prepare_for_vllm(model, out, **options)
        assert word in str(caught.value)
    with pytest.raises(OptionError, match="no adapter to serve"):
        gazelle.prepare_for_vllm(FastLanguageModel.from_pretrained(str(base), load_in_4bit=False)[0], out, merge=False)
    assert not out.exists()


def test_a_failed_export_leaves_the_earlier_one(adapted, tmp_path):
    model, out = adapted(), tmp_path / "out"
    command = gazelle.prepare_for_vllm(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.data[0] = torch.nan
    for quantization in (None, "fp8", "gptq"):
        with pytest.raises(ModelError, match="not numbers"):
            gazelle.prepare_for_vllm(model, out, quantization=quantization, calibration=ROWS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base model", "out"}
    assert serve_command(out) == command


@pytest.mark.parametrize("method", ["merged_4bit", "fp8", "awq", "gptq"])
def test_every_way_of_saving(method, adapted, tmp_path):
    model = adapted()
    options = {"calibration": ROWS, "rows": 2, "length": 40} if method in ("awq", "gptq") else {}
    report = model.save_pretrained_merged(str(tmp_path / "out"), save_method=method, **options)
    assert report.method == method and report.worst[1] > 0
    with pytest.raises(OptionError, match="unknown option") as caught:
        model.save_pretrained_merged(str(tmp_path / "out"), save_method=method, calibratoin=ROWS)
    assert caught.value.found == "calibratoin"
    with pytest.raises(OptionError, match="no such way") as caught:
        model.save_pretrained_merged(str(tmp_path / "out"), save_method="gptk")
    assert "gptq" in caught.value.fix
