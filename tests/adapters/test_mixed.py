"""Adapters mixed in one pass give what PEFT gives with each of them active, and leave the model as it was."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models.families import adapt, make

from gazelle.adapters.mixed import BASE, MixedAdapters
from gazelle.base.errors import ModelError, OptionError

CONFIGS = {
    "all": LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "some": LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "ranks": LoraConfig(r=2, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 5},
                        alpha_pattern={"v_proj": 9}),
    "ends": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "o_proj"]),
}


def shaken(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in CONFIGS.items():
        found[name] = tmp_path_factory.mktemp(name)
        with pytest.warns() if name == "ends" else torch.no_grad():
            shaken(get_peft_model(make("llama", 3, tied=False), copy.deepcopy(config))).save_pretrained(found[name])
    return found


def together(model, mixed, asked, lengths):
    """Logits [T, V] of rows that lie end to end; attention is left out, by rows of one token and no positions."""
    ids = torch.arange(3, 3 + sum(lengths))
    kept = torch.arange(sum(lengths))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = []
    with mixed.applied(asked, lengths, kept), torch.no_grad():
        hidden = inner.model.embed_tokens(ids[None])
        for layer in inner.model.layers:
            hidden = hidden + layer.mlp(hidden) + layer.self_attn.o_proj(layer.self_attn.q_proj(hidden))
            hidden = hidden + layer.self_attn.v_proj(hidden).sum(-1, keepdim=True)
            hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
        out = inner.lm_head(hidden)
    return out[0]


def alone(model, lengths):
    return together(model, MixedAdapters(torch.nn.Linear(1, 1)), [None] * len(lengths), lengths)


def test_each_row_gets_its_own(folders):
    base = make("llama", 3, tied=False).eval()
    state = copy.deepcopy(base.state_dict())
    learnt = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    asked, lengths = ["some", BASE, "all", None, "ends", "ranks", "all"], [3, 2, 1, 4, 5, 2, 3]
    mixed = MixedAdapters(base, folders)
    got = together(base, mixed, asked, lengths).split(lengths)
    plain = alone(base, lengths).split(lengths)
    mixed.close()
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == learnt
    assert base.state_dict().keys() == state.keys() and not hasattr(base, "peft_config")
    assert not any("forward" in module.__dict__ for module in base.modules())
    for row, name in enumerate(asked):
        if name in (None, BASE):
            torch.testing.assert_close(got[row], plain[row], rtol=0, atol=0)
            continue
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folders[name]).eval()
        want = alone(adapted, lengths).split(lengths)[row]
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)
        assert (want - plain[row]).abs().max() > 0.1


def test_beside_an_adapter_that_is_active(folders):
    model = shaken(adapt(make("llama", 3, tied=False))).eval()
    lengths = [2, 3, 4, 1]
    active = alone(model, lengths).split(lengths)
    with model.disable_adapter():
        plain = alone(model, lengths).split(lengths)
    mixed = MixedAdapters(model, {"ranks": folders["ranks"]})
    assert mixed.names == ("default", "ranks") and list(model.peft_config) == ["default"]
    got = together(model, mixed, [None, BASE, "ranks", "default"], lengths).split(lengths)
    other = PeftModel.from_pretrained(make("llama", 3, tied=False), folders["ranks"]).eval()
    want = [active[0], plain[1], alone(other, lengths).split(lengths)[2], active[3]]
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone(model, lengths), torch.cat(active), rtol=0, atol=0)
    mixed.close()
    assert model.active_adapter == "default"
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("change", ["merged", "dora"])
def test_what_is_more_than_factors_stays_peft_s(change, folders):
    model = adapt(make("llama", 3, tied=False), use_dora=change == "dora").eval()
    if change == "merged":
        model.merge_adapter()
    lengths = [3, 2]
    want = alone(model, lengths)
    mixed = MixedAdapters(model)
    assert mixed.names == ()
    torch.testing.assert_close(together(model, mixed, [None, None], lengths), want, rtol=0, atol=0)
    with pytest.raises(OptionError):
        mixed.check(BASE)
    with pytest.raises(ModelError, match="cannot be used beside"):
        MixedAdapters(model, {"ranks": folders["ranks"]})


def test_an_adapter_of_another_model_leaves_nothing_behind(folders, tmp_path):
    base = make("llama", 3, hidden_size=60, tied=False).eval()
    with pytest.raises(ModelError, match="another model"):
        MixedAdapters(base, {"all": folders["all"]})
    with pytest.raises(ModelError, match="no adapter lies here"):
        MixedAdapters(base, {"all": tmp_path})
    assert not hasattr(base, "peft_config") and "lora" not in str(base)


@pytest.mark.parametrize("name", ["", BASE, "default"])
def test_a_name_that_is_taken(name, folders):
    with pytest.raises(OptionError, match="taken"):
        MixedAdapters(adapt(make("llama", 3, tied=False)), {name: folders["all"]})


def test_an_adapter_with_a_nan_would_reach_the_tokens_of_others(folders):
    model = adapt(make("llama", 3, tied=False))
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="numbers that are none"):
        MixedAdapters(model, {"all": folders["all"]})


def test_a_name_that_is_not_there(folders):
    mixed = MixedAdapters(make("llama", 3, tied=False), {"all": folders["all"]})
    with pytest.raises(OptionError) as caught:
        mixed.check("../all")
    assert caught.value.expected == "all"
