"""Exports as people ask for them: from a model, an adapter or a folder; and what becomes of one that fails."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.llama import Llama
from tests.models.families import adapt, make

from gazelle.__main__ import main
from gazelle.base.errors import ModelError, OptionError, OutputError
from gazelle.export import gguf as export
from gazelle.export.gguf import export_gguf
from gazelle.export.gguf_recipe import RECIPES, find_recipes
from gazelle.facade.language_model import FastLanguageModel, bind
from gazelle.models.gguf_file import read_gguf
from gazelle.models.save import save_merged
from gazelle.quantize.bnb import dequantize_linear

IDS = [5, 300, 17, 42, 8, 260, 99]


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path / "base"
    save_merged(model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), tokenizer, folder,
                dtype="float32")
    return folder


@pytest.fixture
def run(checkpoint):
    """A folder as a run leaves it: an adapter whose base is `checkpoint`."""
    folder = checkpoint.parent / "run"
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def logits_in(path):
    with Llama(path) as llama:
        return llama.logits(IDS)


def test_an_adapter_is_merged(model, tokenizer, tmp_path):
    adapted = bind(adapt(model("llama"))).eval()
    whole, = adapted.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, quantization_method="f32")
    np.testing.assert_allclose(logits_in(whole), logits_of(adapted), atol=2e-5)
    assert isinstance(adapted, PeftModel)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_one_end_unties_the_head(model, tokenizer, tmp_path):
    adapted = adapt(model("llama"), targets=["embed_tokens"]).eval()
    path, = export_gguf(adapted, tokenizer, tmp_path, "f32")
    assert "output.weight" in read_gguf(path).tensors
    np.testing.assert_allclose(logits_in(path), logits_of(adapted), atol=2e-5)


def test_several_files_at_once(model, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    plain = bind(model("qwen2", hidden_size=64, num_attention_heads=4, head_dim=16))
    files = plain.save_pretrained_gguf(str(tmp_path), tokenizer, quantization_method=["q8_0", "bf16"])
    assert [file.name for file in files] == ["model-Q8_0.gguf", "model-BF16.gguf"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model-BF16.gguf", "model-Q8_0.gguf", "notes.txt"]
    assert read_gguf(files[0]).metadata["general.file_type"] == 7
    assert all(file.stat().st_mode & 0o777 == (tmp_path / "notes.txt").stat().st_mode & 0o777 for file in files)


def test_save_format_gguf(checkpoint, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False, dtype="float32")
    model.save_pretrained(str(tmp_path / "out"), save_format="gguf", quantization_method="f32")
    np.testing.assert_allclose(logits_in(tmp_path / "out" / "model-F32.gguf"), logits_of(model), atol=2e-5)
    with pytest.raises(OptionError, match="no such format"):
        model.save_pretrained(str(tmp_path / "out"), save_format="ggml")
    model.save_pretrained(str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_a_run_from_the_command_line(run, capsys):
    assert main(["export", str(run), "--to", "gguf:f32,f16"]) == 0
    path = run.parent / "run-gguf" / "model-F32.gguf"
    assert str(path) in capsys.readouterr().out
    model, _ = FastLanguageModel.from_pretrained(str(run), dtype="float32")
    np.testing.assert_allclose(logits_in(path), logits_of(model.eval()), atol=2e-5)
    assert path.with_name("model-F16.gguf").exists()


def test_a_base_kept_in_four_bits_is_exported_as_trained(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make("llama", 24, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
         vocab_size=384).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"}, dtype=torch.float32,
                                                quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    path, = export_gguf(base, tokenizer, tmp_path / "out", "f32")
    want = dequantize_linear(base.model.layers[1].mlp.down_proj).float().numpy()
    np.testing.assert_array_equal(read_gguf(path).read("blk.1.ffn_down.weight"), want)
    np.testing.assert_allclose(logits_in(path), logits_of(base), atol=5e-2)  # bitsandbytes multiplies in bfloat16


def test_aliases_and_unknown_names():
    assert list(find_recipes("Q4_K, not_quantized,f16")) == ["q4_k_m", "f16"]
    with pytest.raises(OptionError, match="no such GGUF") as caught:
        find_recipes("q4_km")
    assert "q4_k_m" in caught.value.fix
    assert {recipe.file_type for recipe in RECIPES.values()} == {0, 1, 2, 3, 7, 8, 9, *range(10, 19), 32}


@pytest.mark.parametrize(("arguments", "found"), [
    (["--to", "pickle"], "pickle"), (["--to", "gguf:q9"], "q9"), (["--to", "gguf:f16,"], "nothing"),
])
def test_wrong_options_come_before_loading(arguments, found, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("gazelle.facade.exporting.load_model", None)
    assert main(["export", str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert "to do:" in error
    assert found in error or "q8_0" in error


@pytest.fixture
def earlier(tmp_path):
    """A folder with an earlier export."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model-F16.gguf").write_bytes(b"an earlier export")
    return folder


def untouched(folder: Path) -> bool:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()} == {"model-F16.gguf": b"an earlier export"}


@pytest.mark.parametrize("at", [0, 1, 7, 17])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.ENOSPC, "No space left on device")])
def test_an_export_that_breaks_off_changes_nothing(error, at, earlier, model, tokenizer, monkeypatch):
    import gguf

    written = gguf.GGUFWriter.write_tensor_data
    count = 0

    def failing(self, tensor):
        nonlocal count
        count += 1
        if count > at:
            raise error
        written(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    with pytest.raises((KeyboardInterrupt, RuntimeError, OutputError)) as caught:
        export_gguf(model("llama"), tokenizer, earlier, "f16,q8_0")
    assert untouched(earlier)
    if isinstance(error, OSError):
        assert caught.value.found.startswith("No space left on device; ")
        assert caught.value.exit_code == 2


def test_a_killed_process_leaves_no_file_of_that_name(checkpoint, earlier):
    script = ("import os, sys\nfrom gazelle.export import gguf_file\nfrom gazelle.__main__ import main\n"
              "def killed(*_): os.kill(os.getpid(), 9)\ngguf_file.GgufOutput.close = killed\nmain(sys.argv[1:])")
    arguments = ["export", str(checkpoint), "--to", "gguf:f16", "-o", str(earlier)]
    assert subprocess.run([sys.executable, "-c", script, *arguments], check=False).returncode == -9
    assert (earlier / "model-F16.gguf").read_bytes() == b"an earlier export"
    assert not (earlier / "model-Q8_0.gguf").exists()


def test_a_disk_that_is_too_small(checkpoint, earlier, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main(["export", str(checkpoint), "--to", "gguf:f16", "-o", str(earlier)]) == 2
    error = capsys.readouterr().err
    assert "not enough disk space" in error
    assert "1,000 bytes free" in error
    assert untouched(earlier)


def test_the_size_asked_for_is_that_of_the_files(model, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(export, "check_space", lambda _, needed: asked.append(needed))
    files = export_gguf(model("llama", hidden_size=256, vocab_size=8000), tokenizer, tmp_path, "f16,q8_0")
    size = sum(file.stat().st_size for file in files)
    assert size <= asked[0] <= size + 2 * (1 << 20) + 100_000


def test_a_folder_that_may_not_be_written_to(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["export", str(checkpoint), "--to", "gguf:f16", "-o", str(tmp_path / "file" / "out")]) == 2
    assert "the output path runs through a file" in capsys.readouterr().err


def test_a_read_only_folder(checkpoint, earlier, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # as root, permissions alone refuse nothing
    assert main(["export", str(checkpoint), "--to", "gguf:f16", "-o", str(earlier)]) == 2
    assert "Permission denied" in capsys.readouterr().err
    assert untouched(earlier)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value, earlier, model, tokenizer):
    broken = model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ModelError, match="not numbers") as caught:
        export_gguf(broken, tokenizer, earlier, "f16")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.where
    assert untouched(earlier)


def test_nan_in_a_run_exits_with_2(run, capsys):
    weights = load_file(run / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(run), "--to", "gguf:f16"]) == 2
    assert "NaN" in capsys.readouterr().err
    assert list((run.parent / "run-gguf").iterdir()) == []


def test_a_weight_beyond_float16_is_named(model, tokenizer, tmp_path):
    large = model("llama")
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match="too large for float16") as caught:
        export_gguf(large, tokenizer, tmp_path, "f16")
    assert caught.value.where == "blk.0.ffn_up.weight"
    export_gguf(large, tokenizer, tmp_path, "bf16")


def test_memory_is_little_more_than_the_largest_tensor(tmp_path, model, tokenizer):
    """Beside the model's own, in a process of its own."""
    folder = tmp_path / "base"
    save_merged(model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
                      num_key_value_heads=8, head_dim=128), tokenizer, folder)
    script = (
        "import sys, threading, time, torch\nfrom gazelle.export.gguf import export_gguf\n"
        "from gazelle.models.load import load_model\ntorch.set_num_threads(1)\npeak, done = 0, False\n"
        "def own():\n    for line in open('/proc/self/status'):\n"
        "        if line.startswith('RssAnon'): return int(line.split()[1]) // 1024\n"
        "def watch():\n    global peak\n    while not done: peak = max(peak, own()); time.sleep(0.002)\n"
        "model, tokenizer = load_model(sys.argv[1], load_in_4bit=False, dtype='auto', device_map='cpu')\n"
        "before = own()\nthread = threading.Thread(target=watch); thread.start()\n"
        "export_gguf(model, tokenizer, sys.argv[2], 'q8_0')\n"
        "done = True; thread.join()\nprint(peak - before)")
    out = subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "out")], check=True,
                         capture_output=True, text=True).stdout
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    assert whole > 190
    assert int(out) < 100  # the largest tensor has 16 MB in float32


def test_a_language_model_inside_another_model_is_refused(tokenizer, tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    with pytest.raises(ModelError, match="text alone"):
        export_gguf(whole, tokenizer, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_know_is_refused_before_anything_is_written(model, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="bias"):
        export_gguf(model("qwen3", attention_bias=True), tokenizer, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_place_of_the_file(model, tokenizer, tmp_path):
    (tmp_path / "model-F16.gguf").mkdir()
    with pytest.raises(OutputError, match="a folder has the name"):
        export_gguf(model("llama"), tokenizer, tmp_path, "f16")


def test_a_weight_beyond_a_format_is_named(model, tokenizer, tmp_path):
    plain = model("llama", hidden_size=64, num_attention_heads=4, head_dim=16)
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    with pytest.raises(ModelError, match="too large") as caught:
        export_gguf(plain, tokenizer, tmp_path, "q4_0")
    assert caught.value.where == "blk.1.ffn_up.weight" and "bf16" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_a_link_is_exported_beside_itself(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert main(["export", str(tmp_path / "link"), "--to", "GGUF:f16"]) == 0
    assert (tmp_path / "link-gguf" / "model-F16.gguf").exists()
