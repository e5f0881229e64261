"""Saved models give the logits of the model in memory, in plain transformers and plain PEFT."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.models.load import load_model
from gazelle.models.save import save_merged

IDS = torch.tensor([[5, 9, 7, 200, 31]])


def shaken(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "use_rslora": True}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_merged_model_equals_base_and_adapter(options, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    model = shaken(add_lora(model, **options))
    want = logits(model)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32", max_shard_size="20KB")
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits(again), want, atol=1e-4, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert again.generation_config.eos_token_id == 2


@pytest.mark.parametrize("options", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_quantised_bases_are_unpacked(options, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), **options)
    model = shaken(add_lora(model))
    want = logits(model)
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # 8-bit layers also round their inputs while they run; the saved weights do not.
    tolerance = 1e-4 if not options else 0.05 * want.abs().max()
    torch.testing.assert_close(logits(again), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16),
                                                 (torch.bfloat16, torch.bfloat16)])
def test_sixteen_bits(dtype, expected, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), dtype=dtype, load_in_4bit=False)
    save_merged(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == expected
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.to(expected))


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen3"])
def test_families(family, tiny, tmp_path):
    model = shaken(add_lora(tiny(family)))
    save_merged(model, None, tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model),
                               atol=1e-4, rtol=1e-5)


def test_experts_keep_the_names_of_the_hub(tiny, tmp_path):
    from safetensors import safe_open

    model = tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    save_merged(model, None, tmp_path / "out", dtype="float32")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_tied_embeddings_are_written_once(checkpoint, tmp_path):
    from safetensors import safe_open

    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    tokenizer.add_tokens(["<new>"])
    resize_token_embeddings(model, len(tokenizer))
    model = shaken(add_lora(model))
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, torch.tensor([[5, 300]])), logits(model, torch.tensor([[5, 300]])))


def test_adapter_loads_in_plain_peft(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    model = shaken(add_lora(model))
    save_merged(model, tokenizer, tmp_path / "out", save_method="lora")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model))
    modes = {(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_an_earlier_folder_stays_until_the_new_one_is_whole(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    monkeypatch.setattr("gazelle.models.save._write_configs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_merged(model, tokenizer, tmp_path / "out", dtype="float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert not list(tmp_path.glob(".out*"))
