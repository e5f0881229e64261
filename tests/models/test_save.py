"""Saved models give the logits of the model in memory, in plain transformers and plain PEFT."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gazelle.adapters.lora import add_lora
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.base.errors import ModelError, OutputError
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


@pytest.mark.parametrize("options", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_checkpoints_that_came_quantised_are_unpacked(options, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), **options)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    model, tokenizer = load_model(str(tmp_path / "small"))
    conversions = model._weight_conversions
    model = shaken(add_lora(model))
    want = logits(model)
    save_merged(model, tokenizer, tmp_path / "out", dtype="float32")
    assert model.get_base_model()._weight_conversions is conversions
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tolerance = 1e-4 if not options else 0.05 * want.abs().max()
    torch.testing.assert_close(logits(again), want, atol=tolerance, rtol=0)


def test_weights_quantised_otherwise_are_refused(tiny, tmp_path):
    model = tiny()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match="cannot be merged") as caught:
        save_merged(model, None, tmp_path / "out")
    assert caught.value.found == "fp8 weights"
    assert list(tmp_path.iterdir()) == []


def test_settings_that_need_sampling_switch_it_on(tiny, tmp_path):
    model = tiny()
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    save_merged(model, None, tmp_path / "out", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (again.temperature, again.top_p, again.do_sample) == (0.6, 0.9, True)
    assert not model.generation_config.do_sample
    model.generation_config.num_beams, model.generation_config.num_return_sequences = 1, 3
    model.generation_config.do_sample, model.generation_config.pad_token_id = False, -1
    model.generation_config.max_new_tokens = 0
    with pytest.raises(ModelError, match="contradict each other"):
        save_merged(model, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["consolidated.safetensors", "tokenizer_notes.txt", "README.md"])
def test_other_peoples_files_are_kept(name, tiny, tmp_path):
    model = add_lora(tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match="other files, which would be lost"):
        save_merged(model, None, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_merge_and_an_adapter_do_not_replace_each_other(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    model = add_lora(model)
    for method in ("lora", "merged_16bit"):
        for _ in range(2):  # each replaces its like
            save_merged(model, tokenizer, tmp_path / method, save_method=method)
    assert (tmp_path / "lora" / "README.md").exists()  # PEFT's own
    for method, other in (("lora", "merged_16bit"), ("merged_16bit", "lora")):
        with pytest.raises(OutputError, match="which would be lost") as caught:
            save_merged(model, tokenizer, tmp_path / other, save_method=method)
        assert caught.value.where == str(tmp_path / other)
        assert caught.value.fix


@pytest.mark.parametrize(("options", "kind"), [({"load_in_4bit": False}, "Linear"), ({"load_in_8bit": True},
                         "Linear8bitLt"), ({"load_in_4bit": True, "quant_method": "fp4"}, "Linear4bit")])
def test_an_adapter_finds_its_base_as_it_was_kept(options, kind, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), max_seq_length=192, **options)
    model = shaken(add_lora(model))
    want = logits(model)
    save_merged(model, tokenizer, tmp_path / "out", save_method="lora")
    again, _ = load_model(str(tmp_path / "out"))
    layer = again.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == kind
    if kind == "Linear4bit":
        assert layer.weight.quant_state.quant_type == "fp4"
    assert again.max_seq_length == 192
    assert torch.equal(logits(again.eval()), want)
    chosen, _ = load_model(str(tmp_path / "out"), load_in_4bit=True, max_seq_length=64)  # the caller's word counts
    assert type(chosen.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert chosen.max_seq_length == 64
    (tmp_path / "out" / "gazelle.json").write_text('{"load_in_4bit": "no"}')
    with pytest.raises(ModelError, match="wrong kind"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize(("stated", "base", "length"), [(192, 64, 192), (192, 192, 128), (10**30, 64, 128),
                                                        (100, 64, 128)])
def test_without_a_record_the_tokenizer_tells_the_length(stated, base, length, checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    save_merged(add_lora(model), tokenizer, tmp_path / "out", save_method="lora")
    (tmp_path / "out" / "gazelle.json").unlink()
    for folder, value in ((tmp_path / "out", stated), (checkpoint, base)):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    again, _ = load_model(str(tmp_path / "out"))
    assert again.max_seq_length == length
    assert type(again.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


def test_new_tokens_with_embeddings_trained_in_full(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    tokenizer.add_tokens(["<new>"])
    resize_token_embeddings(model, len(tokenizer))
    model = shaken(add_lora(model, modules_to_save=["embed_tokens", "lm_head"]))
    ids = torch.tensor([[5, 300, 7]])
    want = logits(model, ids)
    for method in ("lora", "merged_16bit"):
        save_merged(model, tokenizer, tmp_path / method, save_method=method,
                    **({} if method == "lora" else {"dtype": "float32"}))
        again, _ = load_model(str(tmp_path / method), load_in_4bit=False)
        torch.testing.assert_close(logits(again.eval(), ids), want, atol=1e-4, rtol=1e-5)


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
    monkeypatch.setattr("gazelle.models.save.write_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_merged(model, tokenizer, tmp_path / "out", dtype="float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert not list(tmp_path.glob(".out*"))
