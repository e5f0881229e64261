"""An adapter alone, on its base in the real llama.cpp, computes what transformers and PEFT compute."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.llama import Llama
from tests.models.families import adapt, quantized

from gazelle.base.errors import ModelError, OptionError, OutputError
from gazelle.export.gguf import export_gguf
from gazelle.export.gguf_adapter import export_gguf_adapter
from gazelle.facade.language_model import bind
from gazelle.models.gguf_file import read_gguf

IDS = [5, 300, 17, 42, 42, 8, 260, 99, 3, 77]
BOTH = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # heads enough to be permuted


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].float().numpy()


def compare(adapted, tokenizer, folder, tolerance=3e-5):
    """The base alone and with the adapter, in llama.cpp and here; returns the adapter's file."""
    want = logits(adapted)
    with adapted.disable_adapter():
        base, = export_gguf(adapted, tokenizer, folder, "f32")
        plain = logits(adapted)
    adapter = export_gguf_adapter(adapted, tokenizer, folder / "adapter.gguf")
    with Llama(base) as llama:
        np.testing.assert_allclose(llama.logits(IDS), plain, atol=tolerance * np.abs(plain).max())
    with Llama(base, lora=adapter) as llama:
        got = llama.logits(IDS)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    assert np.abs(want - plain).max() > 100 * tolerance * np.abs(want).max()  # the adapter shows
    np.testing.assert_array_equal(logits(adapted), want)  # and the model is what it was
    return adapter


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite"])
def test_logits_are_those_of_peft(family, model, tokenizer, tmp_path):
    size = {"hidden_size": 64, "sliding_window": None} | BOTH if family in ("phi3", "mistral", "qwen2") else BOTH
    compare(adapt(model(family, **size)), tokenizer, tmp_path)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_families_with_ggml_s_own_gelu(family, model, tokenizer, tmp_path):
    compare(adapt(model(family)), tokenizer, tmp_path, 3e-3)


def test_rank_and_scale_by_layer(model, tokenizer, tmp_path):
    """rsLoRA, other ranks and alphas for some layers, and layers without an adapter."""
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
                        rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 3}, init_lora_weights=False)
    adapted = get_peft_model(model("llama", **BOTH), config)
    file = read_gguf(compare(adapted, tokenizer, tmp_path))
    assert file.metadata["adapter.lora.alpha"] == pytest.approx(12)  # 6 / √4 · 4
    assert (file.metadata["general.type"], file.metadata["adapter.type"]) == ("adapter", "lora")
    assert file.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert file.tensors["blk.0.attn_v.weight.lora_b"].shape == (32, 2)
    assert len(file.tensors) == 2 * 3 * 2


def test_an_adapter_on_embedding_and_head(model, tokenizer, tmp_path):
    compare(adapt(model("llama", tied=False), targets=["embed_tokens", "lm_head", "o_proj"]), tokenizer, tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_ends_is_refused(target, model, tokenizer, tmp_path):
    with pytest.raises(ModelError, match=r"llama\.cpp") as caught:
        export_gguf_adapter(adapt(model("llama"), targets=[target]), tokenizer, tmp_path / "a.gguf")
    assert target in caught.value.where
    assert not list(tmp_path.iterdir())


def test_two_adapters_at_once(model, tokenizer, tmp_path):
    adapted = adapt(model("qwen2", hidden_size=64, **BOTH))
    adapted.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "other"])
    compare(adapted, tokenizer, tmp_path)


def test_an_adapter_on_a_base_in_four_bits(tokenizer, tmp_path):
    adapted = quantized(tmp_path / "base", load_in_4bit=True)
    file = read_gguf(export_gguf_adapter(adapted, tokenizer, tmp_path / "adapter.gguf"))
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    name = "blk.1.ffn_down.weight.lora_"
    np.testing.assert_array_equal(file.read(f"{name}a"), layer.lora_A["default"].weight.detach().numpy())
    np.testing.assert_array_equal(file.read(f"{name}b"), layer.lora_B["default"].weight.detach().numpy())
    assert file.metadata["adapter.lora.alpha"] == 6


@pytest.mark.parametrize(("options", "what"), [
    ({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "trained in full"),
    ({"trainable_token_indices": [3, 4]}, "tokens"), ({"bias": "all"}, "biases"), ({"lora_bias": True}, "biases"),
])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_more_than_factors_is_refused(options, what, model, tokenizer, tmp_path):
    adapted = adapt(model("llama", tied=False), targets=["q_proj"], **options)
    with pytest.raises(ModelError, match=what):
        export_gguf_adapter(adapted, tokenizer, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_what_has_no_adapter_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(OptionError, match="no adapter"):
        export_gguf_adapter(model("llama"), tokenizer, tmp_path / "a.gguf")
    adapted = adapt(model("llama"))
    with adapted.disable_adapter(), pytest.raises(OptionError, match="no adapter"):
        export_gguf_adapter(adapted, tokenizer, tmp_path / "a.gguf")
    adapted.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        export_gguf_adapter(adapted, tokenizer, tmp_path / "a.gguf")


def test_an_earlier_file_stays_when_factors_are_no_numbers(model, tokenizer, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"earlier")
    adapted = adapt(model("llama"))
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not numbers") as caught:
        export_gguf_adapter(adapted, tokenizer, tmp_path / "a.gguf")
    assert "blk.1.ffn_up.weight.lora_b" in caught.value.where
    assert (tmp_path / "a.gguf").read_bytes() == b"earlier"


def test_the_methods_of_a_model(model, tokenizer, tmp_path):
    adapted = bind(adapt(model("llama")))
    file, = adapted.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, save_method="lora")
    assert file == tmp_path / "out" / "adapter.gguf"
    assert read_gguf(file).metadata["general.type"] == "adapter"
    with pytest.raises(OptionError, match="save_method"):
        adapted.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, save_method="lroa")
    file.unlink()
    file.mkdir()
    with pytest.raises(OutputError, match="a folder has the name"):
        adapted.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, save_method="lora")
