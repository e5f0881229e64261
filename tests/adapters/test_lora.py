"""add_lora: which layers it adapts, what it refuses, and that it leaves the rest alone."""

import logging
import re

import pytest
import torch

from gazelle.adapters.lora import add_lora
from gazelle.base.errors import OptionError

SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model):
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize(("family", "wanted", "expected"), [
    ("llama", None, SPLIT), ("llama", "all-linear", SPLIT), ("llama", ["q_proj"], ["q_proj"]),
    ("llama", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], SPLIT),
    ("llama", ["q_proj", "k_proj", "v_proj", "dense"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("llama", "q_proj", ["q_proj"]), ("llama", r".*\.[qv]_proj", ["q_proj", "v_proj"]),
    ("llama", ["self_attn.q_proj"], ["q_proj"]), ("llama", ["query_key_value"], ["q_proj", "k_proj", "v_proj"]),
    ("phi3", SPLIT, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ("phi3", ["qkv_proj"], ["qkv_proj"]),
])
def test_target_names(family, wanted, expected, tiny):
    assert adapted(add_lora(tiny(family), target_modules=wanted)) == set(expected)


def test_only_factors_are_trained_and_the_start_is_the_model_itself(tiny, caplog):
    model = tiny()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    with caplog.at_level(logging.INFO, "gazelle"):
        model = add_lora(model, r=4)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert torch.equal(model(ids).logits, before)
    count = sum(weight.numel() for weight in trained.values())
    assert re.search(rf"trainable params: {count:,} \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{{4}}", caplog.text)


def test_factors_of_a_16bit_model_are_float32(tiny):
    model = add_lora(tiny().bfloat16())
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_seed_decides_the_factors_and_nothing_else(tiny):
    def factors(model, **options):
        return torch.cat([w.flatten() for n, w in add_lora(model, **options).named_parameters() if "lora_A" in n])

    models = [tiny() for _ in range(3)]  # making one seeds the program's generator
    torch.manual_seed(98)
    first = factors(models[0])
    torch.manual_seed(99)
    assert torch.equal(first, factors(models[1]))
    assert not torch.equal(first, factors(models[2], random_state=1))


def test_random_state_of_the_program_is_kept(tiny):
    model = tiny()
    state = torch.random.get_rng_state()
    add_lora(model)
    assert torch.equal(state, torch.random.get_rng_state())


def test_chosen_layers(tiny):
    model = add_lora(tiny(num_hidden_layers=4), layers_to_transform=[1, 2])
    assert {name.split(".layers.")[1][0] for name, _ in model.named_parameters() if "lora_A" in name} == {"1", "2"}


def test_variants_reach_peft(tiny):
    config = add_lora(tiny(), use_rslora=True, use_dora=True, lora_dropout=0.1, bias="lora_only",
                      loftq_config={}).peft_config["default"]
    assert (config.use_rslora, config.use_dora, config.lora_dropout, config.bias) == (True, True, 0.1, "lora_only")
    assert config.init_lora_weights is True


def test_gradient_checkpointing(tiny):
    model = add_lora(tiny(), use_gradient_checkpointing=True).train()
    assert model.is_gradient_checkpointing
    model(torch.randint(3, 64, (1, 5))).logits.sum().backward()
    assert all(w.grad is not None for n, w in model.named_parameters() if "lora_B" in n)
    assert not add_lora(tiny(), use_gradient_checkpointing="unsloth").is_gradient_checkpointing


@pytest.mark.parametrize(("options", "where", "fix"), [
    ({"r": 0}, "r", "change r"), ({"r": 8.0}, "r", "change r"), ({"lora_alpha": -1}, "lora_alpha", "change"),
    ({"lora_dropout": 1.0}, "lora_dropout", "change"), ({"bias": "some"}, "bias", "change"),
    ({"target_modules": ["q_prj"]}, "target_modules", "'q_proj'"),
    ({"target_modules": []}, "target_modules", "use one of"),
    ({"target_modules": "nothing"}, "target_modules", "use one of"),
    ({"layers_to_transform": [0, 2]}, "layers_to_transform", "change"),
    ({"layers_to_transform": -1}, "layers_to_transform", "change"),
    ({"modules_to_save": ["lm_heat"]}, "modules_to_save", "'lm_head'"),
    ({"use_rs_lora": True}, "get_peft_model", "'use_rslora'"),
    ({"use_gradient_checkpointing": "sometimes"}, "use_gradient_checkpointing", "change"),
    ({"loftq_config": {"bits": 4}}, "loftq_config", "correct"),
    ({"init_lora_weights": "nonsense"}, "get_peft_model", "change"),
])
def test_refused_options(options, where, fix, tiny):
    model = tiny()
    with pytest.raises(OptionError) as caught:
        add_lora(model, **options)
    assert caught.value.where == where
    assert fix in caught.value.fix
    assert caught.value.found
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_second_adapter_is_refused(tiny):
    with pytest.raises(OptionError, match="has an adapter already"):
        add_lora(add_lora(tiny()))
