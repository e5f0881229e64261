"""A model quantised in memory is the one that loading in so many bits gives."""

import pytest
import torch
from bitsandbytes import functional
from tests.models.test_save import IDS, logits, shaken
from transformers import AutoModelForCausalLM

from gazelle import FastLanguageModel
from gazelle.adapters.lora import add_lora
from gazelle.adapters.merge import merged_tensors
from gazelle.base.errors import ModelError, OptionError
from gazelle.models.load import load_model
from gazelle.models.requantize import quantize_model
from gazelle.models.save import save_merged
from gazelle.models.swap import accelerate
from gazelle.quantize.bnb import forbid_repacking


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """For every test here."""


@pytest.mark.parametrize(("dtype", "options"), [("nf4", {"load_in_4bit": True}), ("int8", {"load_in_8bit": True})])
def test_it_is_what_loading_gives(dtype, options, checkpoint, tmp_path):
    plain, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    loaded, _ = load_model(str(checkpoint), **options)
    want = logits(loaded.eval())
    quantize_model(plain.eval(), dtype)
    assert torch.equal(logits(plain), want)
    assert plain.lm_head.weight.dtype == torch.float32
    assert plain.gazelle_loading == loaded.gazelle_loading
    with pytest.raises(ModelError, match="quantised already"):
        quantize_model(plain, dtype)
    # An adapter trained on it finds it in the same way again.
    adapted = shaken(add_lora(plain))
    save_merged(adapted, tokenizer, tmp_path / "out", save_method="lora")
    again, _ = load_model(str(tmp_path / "out"))
    assert torch.equal(logits(again.eval()), logits(adapted))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("dtype", "options"), [("nf4", {"load_in_4bit": True}), ("int8", {"load_in_8bit": True})])
def test_an_adapter_stays_beside_it(dtype, options, swapped, checkpoint):
    plain, _ = load_model(str(checkpoint), load_in_4bit=False)
    model = shaken(add_lora(plain))
    other = shaken(add_lora(load_model(str(checkpoint), **options)[0]))
    other.load_state_dict({name: weight for name, weight in model.state_dict().items() if "lora_" in name},
                          strict=False)
    if swapped:
        accelerate(model)
        accelerate(other)
        logits(model)
    factors = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" in name}
    quantize_model(model, dtype)
    assert torch.equal(logits(model), logits(other))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], factor) and parameters[name].requires_grad
               for name, factor in factors.items())
    logits(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameters[name].grad is not None for name in factors)
    with pytest.warns(UserWarning, match="rounding errors"):  # PEFT knows what it merges into
        merged, want = model.merge_and_unload(), other.merge_and_unload()
    assert torch.equal(logits(merged), logits(want))


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_sixteen_bits(dtype, checkpoint, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
    assert model.quantize(dtype=dtype) is model
    kept = torch.float16 if dtype is torch.float16 else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {kept}
    assert torch.equal(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, weight.to(kept))
    assert logits(model).isfinite().all()
    model.save_pretrained_merged(str(tmp_path / "out"), tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kept


def test_what_a_model_cannot_be_quantised_to(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(str(checkpoint), load_in_4bit=False)
    with pytest.raises(OptionError, match="in memory") as caught:
        model.quantize(dtype="gptq")
    assert "exports" in caught.value.expected
    with pytest.raises(OptionError):
        model.quantize(dtype=torch.float64)
    adapted = FastLanguageModel.get_peft_model(model)
    adapted.merge_adapter()
    with pytest.raises(ModelError, match="merged into the weights"):
        adapted.quantize("nf4")


@pytest.mark.parametrize("base", [{"load_in_4bit": False}, {"load_in_4bit": True}], ids=["plain", "nf4"])
def test_merged_in_four_bits(base, checkpoint, tmp_path):
    """Plain transformers reads NF4 of the merged weights, bit for bit, and answers nearly the same."""
    model, tokenizer = load_model(str(checkpoint), **base)
    model.generation_config.eos_token_id = [2, 0]
    model = shaken(add_lora(model))
    save_merged(model, tokenizer, tmp_path / "plain", dtype="bfloat16")
    report = save_merged(model, tokenizer, tmp_path / "out", save_method="merged_4bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    forbid_repacking(again)  # which fails on layers as small as these
    exact = dict(merged_tensors(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    for name, module in again.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = plain.get_submodule(name).weight.data
            own = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4",
                                                                       compress_statistics=True))
            read = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(read, own)
            plain.get_submodule(name).weight.data = read.float()
            merged = exact[f"{name}.weight"].float()
            assert report.errors[f"{name}.weight"] == pytest.approx(float((read.float() - merged).norm()
                                                                          / merged.norm()), rel=1e-4)
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert again.generation_config.eos_token_id == [2, 0]
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.model.embed_tokens.weight
    got, want = logits(again), logits(plain.float())
    assert (got - want).norm() < 0.03 * want.norm()  # layers multiply in bfloat16
    assert report.worst[1] == max(report.errors.values())
    loaded, _ = load_model(str(tmp_path / "out"))
    assert torch.equal(logits(loaded.eval()), got)


def test_a_nan_stops_any_way_of_saving_and_is_named(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    model = shaken(add_lora(model))
    model.get_base_model().model.layers[1].self_attn.v_proj.lora_A["default"].weight.data[0, 0] = torch.inf
    for method in ("merged_16bit", "merged_4bit"):
        with pytest.raises(ModelError, match="not numbers") as caught:
            save_merged(model, tokenizer, tmp_path / "out", save_method=method)
        assert "model.layers.1.self_attn.v_proj.weight" in caught.value.where
        assert not (tmp_path / "out").exists()


def test_the_report_says_how_far_sixteen_bits_are(checkpoint, tmp_path):
    model, tokenizer = load_model(str(checkpoint), load_in_4bit=False)
    report = save_merged(model, tokenizer, tmp_path / "out", dtype="bfloat16")
    name, error = report.worst
    assert 2**-11 < error < 2**-8
    weight = model.get_parameter(name).detach().double()
    want = float((weight.to(torch.bfloat16).double() - weight).norm() / weight.norm())
    assert error == pytest.approx(want, rel=1e-4)
    assert set(save_merged(model, tokenizer, tmp_path / "all", dtype="float32").errors.values()) == {0.0}
