"""Every family: a small random model, exported, computes in the real llama.cpp what it computes in transformers."""

import gguf
import numpy as np
import pytest
import torch
from tests.llama import Llama, quantize
from tests.models.families import FAMILIES
from transformers import AutoModelForCausalLM

from gazelle.base.errors import ModelError
from gazelle.export.gguf import export_gguf
from gazelle.export.gguf_recipe import RECIPES
from gazelle.models.gguf import convert_gguf
from gazelle.models.gguf_file import read_gguf
from gazelle.quantize.gguf import KINDS

IDS = [5, 300, 17, 42, 42, 8, 260, 99, 3, 77, 150, 201, 7, 9, 11, 350, 64, 65, 66, 67]
FLOAT32 = {False: 2e-5, True: 2e-3}  # the larger bound is for GELU: a last bit decides which half float is looked up


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def ggml_gelu(x):
    """GELU as ggml's CPU code has it: looked up in a table from half floats to half floats."""
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def with_ggml_gelu(model):
    """The model, with that GELU if it has one: weights alone are to be compared."""
    if model.config.model_type.startswith("gemma"):
        for layer in model.model.layers:
            layer.mlp.act_fn.forward = ggml_gelu
    return model


def compare(path, model, tolerance, ids=IDS, context=64):
    """Logits row by row: within `tolerance` of the largest, and the same likeliest token."""
    want = logits(model, ids)
    with Llama(path, context=context) as llama:
        got = llama.logits(ids)
    assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())
    assert (got.argmax(-1) == want.argmax(-1)).all()


# Windows that llama.cpp has no notion of are cut off by the context length: those rows are compared up to there.
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tied, model, tokenizer, tmp_path):
    if not tied and family in ("gemma", "gemma2"):
        pytest.skip("llama.cpp knows no head of its own for them")
    original = model(family, tied=tied)
    whole, half = export_gguf(original, tokenizer, tmp_path, "f32,f16")
    limit = read_gguf(whole).metadata
    ids = IDS[:limit[f"{limit['general.architecture']}.context_length"]]
    original = with_ggml_gelu(original)
    compare(whole, original, FLOAT32[family.startswith("gemma")], ids)
    compare(half, original, 2e-2, ids)


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                   "original_max_position_embeddings": 32}}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "beta_fast": 16.0,
                                   "original_max_position_embeddings": 64}}),
    ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}}),
    ("gemma3", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("gemma3", {"final_logit_softcapping": 3.0}),
    ("gemma2", {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}),
    ("gemma2", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
])
def test_other_settings(family, options, model, tokenizer, tmp_path):
    original = model(family, **options)
    compare(export_gguf(original, tokenizer, tmp_path, "f32")[0], with_ggml_gelu(original),
            FLOAT32[family.startswith("gemma")])


def test_long_rope_takes_either_factors_by_length(model, tokenizer, tmp_path):
    original = model("phi4-mini")
    path, = export_gguf(original, tokenizer, tmp_path, "f32")
    compare(path, original, 2e-5, context=512)
    compare(path, original, 2e-5, ids=(IDS * 27)[:520], context=1024)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3", "granite", "smollm3"])
def test_what_is_read_back_is_what_was_written(family, model, tokenizer, tmp_path):
    size = {"query_pre_attn_scalar": 8} if family.startswith("gemma") else {}
    original = model(family, head_dim=8, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, **size)
    folder = convert_gguf(export_gguf(original, tokenizer, tmp_path, "f32")[0])
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    want = dict(original.named_parameters())
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, want[name], rtol=0, atol=2e-7)  # norms are kept as 1 + w
    np.testing.assert_allclose(logits(again), logits(original), atol=1e-5)


@pytest.mark.parametrize("method", [name for name in RECIPES if name not in ("f32", "f16", "bf16")])
@pytest.mark.parametrize(("family", "tied", "columns"), [
    ("llama", True, 256), ("llama", False, 256), ("phi3", False, 256), ("qwen2", True, 288), ("gemma2", True, 256)])
def test_formats_are_those_of_llama_cpp(family, tied, columns, method, model, tokenizer, tmp_path, monkeypatch):
    heads = {"num_attention_heads": columns // 32, "num_key_value_heads": 2 if family == "llama" and tied else
             columns // 32, "head_dim": 32}
    original = model(family, tied=tied, num_hidden_layers=17, hidden_size=columns, intermediate_size=256,
                     **({"layer_types": None} if family == "gemma2" else {}), **heads)
    kinds = {}

    def note(self, name, shape, kind):
        kinds[name] = kind

    source, = export_gguf(original, tokenizer, tmp_path / "whole", "f32")
    quantize(source, tmp_path / "theirs.gguf", RECIPES[method].file_type)
    monkeypatch.setattr("gazelle.export.gguf_file.GgufOutput.announce", note)
    monkeypatch.setattr("gazelle.export.gguf_file.GgufOutput.write", lambda *_: None)
    export_gguf(original, tokenizer, tmp_path / "ours", method)
    theirs = {name: gguf.GGMLQuantizationType(entry.kind).name.lower()
              for name, entry in read_gguf(tmp_path / "theirs.gguf").tensors.items()}
    assert kinds == theirs


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_runs_in_llama_cpp(method, model, tokenizer, tmp_path):
    if not {RECIPES[method].kind, "q6_k"} <= set(KINDS):
        pytest.skip("the formats with blocks of 256 are not here yet")
    original = model("llama", tied=False, num_hidden_layers=4, hidden_size=256, intermediate_size=512,
                     num_attention_heads=8, num_key_value_heads=2, head_dim=32)
    path, = export_gguf(original, tokenizer, tmp_path, method)
    with Llama(path) as llama:
        got = llama.logits(IDS)
    alike = np.corrcoef(got.ravel(), logits(original).ravel())[0, 1]
    assert alike > {"q2_k": 0.8, "q3_k": 0.95}.get(RECIPES[method].kind, 0.98)


@pytest.mark.parametrize(("family", "options", "found"), [
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "[1, 0, 1, 0, 1]"),
    ("gemma2", {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}, "full_attention"),
    ("phi3", {"head_dim": 16}, "6 heads of 16"),
    ("gemma", {"tied": False}, "a head of its own"),
])
def test_what_llama_cpp_lacks_is_named(family, options, found, model, tokenizer, tmp_path):
    with pytest.raises(ModelError) as caught:
        export_gguf(model(family, **options), tokenizer, tmp_path / "out", "f16")
    assert found in caught.value.found
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
