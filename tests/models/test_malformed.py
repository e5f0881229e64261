"""One clear message for each thing that can be wrong with a checkpoint, an option or an output folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gazelle.adapters.lora import add_lora
from gazelle.base.errors import ModelError, OptionError, OutputError, UserError
from gazelle.models.load import load_model
from gazelle.models.save import save_merged


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder):
    """Save the model again in several files."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("model-*.safetensors"))


def truncate(path, size=-100):
    path.write_bytes(path.read_bytes()[:size])


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan


def drop_tensor(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def wrong_shape(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)


# name -> (what is done to the folder, expected in where, in the message, in the fix)
CHECKPOINTS = {
    "missing shard": (lambda f: shard(f)[1].unlink(), "", "a part of the model is missing", "again"),
    "truncated shard": (lambda f: truncate(shard(f)[0]), "model-00001", "damaged or cut off", "again"),
    "truncated file": (lambda f: truncate(f / "model.safetensors"), "model.safetensors", "damaged or cut off", "again"),
    "header alone": (lambda f: truncate(f / "model.safetensors", 5), "model.safetensors", "cut off", "again"),
    "corrupt header": (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"nonsense"),
                       "model.safetensors", "damaged header", "again"),
    "index without a map": (lambda f: (shard(f), edit(f / "model.safetensors.index.json", weight_map={})),
                            "index.json", "damaged", "again"),
    "pickle only": (pickle_only, "", "pickled", "save_pretrained"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "", "weights are missing", "download"),
    "no config": (lambda f: (f / "config.json").unlink(), "", "not a model", "config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{oops"), "config.json", "not JSON", "again"),
    "unknown model type": (lambda f: edit(f / "config.json", model_type="llamma"), "", "config.json", "update"),
    "impossible config": (lambda f: edit(f / "config.json", num_attention_heads=5), "", "config.json", "transformers"),
    "NaN weights": (lambda f: change_weights(f, nan), "up_proj.weight", "not numbers", "earlier"),
    "missing tensor": (lambda f: change_weights(f, drop_tensor), "", "tensors are missing", "one checkpoint"),
    "wrong shape": (lambda f: change_weights(f, wrong_shape), "", "cannot be loaded", "one checkpoint"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "",
                     "tokenizer cannot be loaded", "tokenizer"),
    "no EOS": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "", "no end-of-sequence", "eos_token"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case, checkpoint, caplog):
    damage, where, what, fix = CHECKPOINTS[case]
    damage(checkpoint)
    with pytest.raises(ModelError) as caught:
        load_model(str(checkpoint), load_in_4bit=False)
    assert_clear(caught.value, where or str(checkpoint), what, fix)
    assert not caplog.records


def test_nan_is_found_before_quantising(checkpoint):
    change_weights(checkpoint, nan)
    with pytest.raises(ModelError, match="not numbers") as caught:
        load_model(str(checkpoint))
    assert "up_proj.weight" in caught.value.where


OPTIONS = {
    "bad dtype": ({"dtype": "flaot16"}, "dtype", "cannot compute", "'float16'"),
    "integer dtype": ({"dtype": torch.int8}, "dtype", "cannot compute", "use one of"),
    "two dtypes": ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype", "two names", "torch_dtype"),
    "no such GPU": ({"device_map": "cuda:7"}, "device_map", "cuda device", "device_map"),
    "unknown device": ({"device_map": "gpu"}, "device_map", "no such kind", "device_map"),
    "both widths": ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit, load_in_8bit", "not both", "leave"),
    "full and 4 bits": ({"load_in_4bit": True, "full_finetuning": True}, "full_finetuning", "be trained", "leave"),
    "full and 8 bits": ({"load_in_8bit": True, "full_finetuning": True}, "full_finetuning", "be trained", "leave"),
    "unknown method": ({"quant_method": "nf5"}, "quant_method", "no such way", "nf4"),
    "unknown option": ({"max_seq_lenght": 5}, "load_model", "unknown option", "'max_seq_length'"),
    "zero length": ({"max_seq_length": 0}, "max_seq_length", "positive", "max_seq_length"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, checkpoint):
    options, where, what, fix = OPTIONS[case]
    with pytest.raises(OptionError) as caught:
        load_model(str(checkpoint), **options)
    assert_clear(caught.value, where, what, fix)


@pytest.mark.parametrize(("name", "what", "fix"), [
    ("some-org/no-such-model", "no hub to ask", "HF_HUB_OFFLINE"), ("./nowhere", "no model at this path", "spelling"),
    ("/nowhere/at/all", "no model at this path", "spelling"), ("model.gguf", "no model at this path", "spelling"),
    ("not a name!", "cannot be a hub name", "spelling")])
def test_names(name, what, fix):
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert_clear(caught.value, name, what, fix)


def test_folder_of_a_gguf_file_says_which(tmp_path):
    (tmp_path / "model.Q4.gguf").touch()
    with pytest.raises(ModelError, match="not a model") as caught:
        load_model(str(tmp_path))
    assert str(tmp_path / "model.Q4.gguf") in caught.value.fix


@pytest.fixture
def adapter(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    return save_merged(add_lora(model), tokenizer, tmp_path / "adapter", save_method="lora").folder


def other_base(adapter, tiny, tiny_tokenizer, **options):
    folder = adapter.parent / "other"
    tiny(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(folder))


ADAPTERS = {
    "another base": (lambda a, *t: other_base(a, *t, hidden_size=64), "made for another model", "adapter_config.json"),
    "fewer layers": (lambda a, *t: other_base(a, *t, num_hidden_layers=1), "made for another model", "adapter_config"),
    "base gone": (lambda a, *_: edit(a / "adapter_config.json", base_model_name_or_path="/gone"),
                  "cannot be found", "put it back"),
    "base not named": (lambda a, *_: edit(a / "adapter_config.json", base_model_name_or_path=None), "not say", "write"),
    "base is an adapter": (lambda a, *_: edit(a / "adapter_config.json", base_model_name_or_path=str(a)),
                           "belongs to another adapter", "merge"),
    "pickled": (lambda a, *_: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "pickled", "save_pre"),
    "no weights": (lambda a, *_: (a / "adapter_model.safetensors").unlink(), "weights are missing", "again"),
    "cut off": (lambda a, *_: truncate(a / "adapter_model.safetensors"), "cut off", "again"),
    "config is nonsense": (lambda a, *_: edit(a / "adapter_config.json", peft_type="LARO"), "be loaded", "check"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, adapter, tiny, tiny_tokenizer):
    damage, what, fix = ADAPTERS[case]
    damage(adapter, tiny, tiny_tokenizer)
    with pytest.raises(ModelError) as caught:
        load_model(str(adapter), load_in_4bit=False)
    assert_clear(caught.value, str(adapter), what, fix)


def file_in_the_way(folder):
    (folder / "out").write_text("")
    return folder / "out" / "model"


def used_folder(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("")
    return folder / "out"


OUTPUTS = {
    "a file in the way": (file_in_the_way, {}, OutputError, "runs through a file", "another"),
    "read-only": (lambda _: "/proc/out", {}, OutputError, "cannot be written", "another folder"),
    "the base model": (lambda folder: folder / "checkpoint", {}, OutputError, "holds the model", "another"),
    "a used folder": (used_folder, {}, OutputError, "other files, which would be lost", "of its own"),
    "unknown method": (lambda folder: folder / "out", {"save_method": "merged_16bits"}, OptionError, "no such way",
                       "'merged_16bit'"),
    "bad size": (lambda folder: folder / "out", {"max_shard_size": "5 apples"}, OptionError, "not a size", "max_shard"),
    "bad dtype": (lambda folder: folder / "out", {"dtype": "int4"}, OptionError, "cannot be saved", "use one of"),
    "no adapter": (lambda folder: folder / "out", {"save_method": "lora"}, OptionError, "no adapter", "merged_16bit"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case, checkpoint, tmp_path):
    place, options, kind, what, fix = OUTPUTS[case]
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    target = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        save_merged(model, tokenizer, target, **options)
    assert_clear(caught.value, str(target) if kind is OutputError else "", what, fix)
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="not enough disk space") as caught:
        save_merged(model, tokenizer, tmp_path / "out")
    assert caught.value.found == "1,000 bytes free"
    assert not (tmp_path / "out").exists()


def assert_clear(error: UserError, where: str, what: str, fix: str) -> None:
    assert where in error.where
    assert what in str(error)
    assert error.found
    assert error.expected
    assert fix in error.fix
    assert "Traceback" not in str(error)
