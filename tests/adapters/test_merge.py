"""Merged weights against PEFT's own merging, for every kind of adapter that add_lora can make."""

import pytest
import torch

from gazelle.adapters.lora import add_lora
from gazelle.adapters.merge import merged_tensors
from gazelle.adapters.tokens import resize_token_embeddings
from gazelle.base.errors import ModelError

KINDS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"bias": "all"},
    "head too": {"target_modules": ["q_proj", "lm_head"]}, "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]}, "lora bias": {"lora_bias": True, "target_modules": ["q_proj"]},
}


def shaken(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in KINDS), ("phi3", "plain"),
                                                ("phi3", "dora")])
def test_equals_pefts_merge(family, kind, tiny):
    model = shaken(add_lora(tiny(family, tie_word_embeddings=False, attention_bias=True), **KINDS[kind]))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in merged_tensors(model)}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    want = model.merge_and_unload().state_dict()
    assert merged.keys() == want.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens(tied, tiny):
    model = tiny(tie_word_embeddings=tied)
    resize_token_embeddings(model, 66)
    model = shaken(add_lora(model))
    merged = dict(merged_tensors(model))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) is tied
    want = model.merge_and_unload()
    torch.testing.assert_close(merged["model.embed_tokens.weight"], want.get_input_embeddings().weight)
    torch.testing.assert_close(merged["lm_head.weight"], want.get_output_embeddings().weight)


def test_only_the_wanted(tiny):
    assert list(dict(merged_tensors(add_lora(tiny()), only={"lm_head.weight"}))) == ["lm_head.weight"]


def test_disabled_and_merged_adapters(tiny):
    model = shaken(add_lora(tiny()))
    name = "model.layers.0.self_attn.q_proj.weight"
    want = dict(merged_tensors(model))[name].clone()
    model.merge_adapter()
    torch.testing.assert_close(dict(merged_tensors(model))[name], want)


def test_other_adapters_are_refused(tiny):
    import peft

    model = peft.get_peft_model(tiny(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="cannot be merged"):
        list(merged_tensors(model))


def test_gradients_are_not_switched_off_meanwhile(tiny):
    """Nor for good by a walk that somebody broke off and holds on to."""
    model = add_lora(tiny())
    walk = merged_tensors(model)
    _, tensor = next(walk)
    assert torch.is_grad_enabled() and not tensor.requires_grad
    assert not any(tensor.requires_grad for _, tensor in walk)
