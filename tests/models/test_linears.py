"""Hugging Face's linear layers as the engine reads them, and what it notices of their changes."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from gazelle.models.families import UnsupportedError
from gazelle.models.linears import base_linear, hooked, read_linear, state_of
from gazelle.quantize.storage import NF4, Dense, Int8

pytestmark = pytest.mark.usefixtures("one_thread")


def lora(base: nn.Module | None = None, r: int = 3, alpha: float = 6, **options: Any) -> Any:
    base = base or nn.Linear(8, 5)
    config = LoraConfig(r=r, lora_alpha=alpha, **options)
    return LoraLinear(base, "default", config, r=r, lora_alpha=alpha, **options).train()


def test_a_plain_layer() -> None:
    layer = nn.Linear(8, 5)
    read = read_linear(layer)
    assert isinstance(read.weight, Dense)
    assert read.weight.weight is layer.weight and read.bias is layer.bias and read.adapter is None
    assert read.trainable_weight is layer.weight
    assert read_linear(nn.Linear(8, 5, bias=False)).bias is None
    layer.weight.requires_grad_(False)
    assert read_linear(layer).trainable_weight is None
    assert base_linear(layer) is layer


def test_an_adapter() -> None:
    layer = lora()
    read = read_linear(layer)
    assert read.weight.weight is layer.get_base_layer().weight
    assert base_linear(layer) is layer.get_base_layer()
    assert read.adapter.a is layer.lora_A["default"].weight and read.adapter.b is layer.lora_B["default"].weight
    assert (read.adapter.scale, read.adapter.dropout) == (2.0, 0.0)
    assert read_linear(lora(r=4, use_rslora=True)).adapter.scale == 3.0


def test_dropout_is_that_of_training() -> None:
    layer = lora(lora_dropout=0.25)
    assert read_linear(layer).adapter.dropout == 0.25
    assert read_linear(layer.eval()).adapter.dropout == 0


def test_adapters_off_merged_and_exchanged() -> None:
    layer = lora()
    weight = layer.get_base_layer().weight.detach().clone()
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.merge()
    assert read_linear(layer).adapter is None
    layer.enable_adapters(False)  # Hugging Face unmerges in the next forward pass
    assert read_linear(layer).adapter is None
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), weight)
    layer.enable_adapters(True)
    assert read_linear(layer).adapter is not None
    layer.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2))
    layer.set_adapter("other")
    assert read_linear(layer).adapter.a.shape == (2, 8)
    layer.set_adapter("nobody")
    assert read_linear(layer).adapter is None


@pytest.mark.parametrize(("make", "kind"), [
    (lambda: bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu"), NF4),
    (lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"), Int8),
])
def test_quantised_layers(make: Callable[[], Any], kind: type) -> None:
    layer = make()
    if kind is Int8:
        weight = torch.randn(32, 64)
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False).to("cpu")
    read = read_linear(layer)
    assert isinstance(read.weight, kind)
    assert read.weight.shape == (32, 64)
    assert read.trainable_weight is None
    assert read.bias is layer.bias


class Odd(nn.Linear):
    """Computes something else."""


class OddTensor(torch.Tensor):
    """As torchao's."""


def odd_weight() -> nn.Linear:
    layer = nn.Linear(8, 5)
    layer.weight = nn.Parameter(torch.randn(5, 8).as_subclass(OddTensor), requires_grad=False)
    return layer


def with_hook(layer: Any, place: str) -> Any:
    getattr(layer, place)(lambda *_: None)
    return layer


def moved_by_accelerate() -> nn.Linear:
    layer = nn.Linear(8, 5)
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: Odd(8, 5), "a linear layer of type .*Odd"),
    (lambda: nn.Conv1d(8, 5, 1), "a linear layer of type torch.nn.modules.conv.Conv1d"),
    (lambda: lora(Odd(8, 5)), "a linear layer of type .*Odd"),
    (odd_weight, "a weight of type OddTensor"),
    (lambda: lora(use_dora=True), "Dora adapters"),
    (lambda: lora(lora_bias=True), "adapters with a bias"),
    (lambda: with_hook(nn.Linear(8, 5), "register_forward_hook"), "hooks"),
    (lambda: with_hook(nn.Linear(8, 5), "register_forward_pre_hook"), "hooks"),
    (lambda: with_hook(nn.Linear(8, 5), "register_full_backward_hook"), "hooks"),
    (lambda: with_hook(lora(), "register_forward_hook"), "hooks"),
    (lambda: lora(with_hook(nn.Linear(8, 5), "register_forward_hook")), "hooks"),
    (moved_by_accelerate, "hooks"),
])
def test_what_is_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        read_linear(make())


def test_several_adapters_at_a_time() -> None:
    layer = lora()
    layer.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2))
    layer.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match="several adapters"):
        read_linear(layer)


def test_the_hooks_that_transformers_leaves_behind_do_no_harm() -> None:
    layer = nn.Linear(8, 5)

    def hook(*_: Any) -> None: ...

    hook.__module__ = "transformers.utils.output_capturing"
    layer.register_forward_hook(hook)
    assert not hooked(layer)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scale": lambda layer: layer.set_scale("default", 3),
    "off": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "other adapter": lambda layer: (layer.update_layer("other", r=2, lora_alpha=2,
                                                       config=LoraConfig(r=2, lora_alpha=2)),
                                    layer.set_adapter("other")),
    "evaluation": lambda layer: layer.eval(),
    "factor": lambda layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.ones(3, 8))),
    "frozen factor": lambda layer: layer.lora_B["default"].weight.requires_grad_(False),
    "trained weight": lambda layer: layer.get_base_layer().weight.requires_grad_(True),
    "weight": lambda layer: setattr(layer.get_base_layer(), "weight", nn.Parameter(torch.ones(5, 8))),
    "memory of weight": lambda layer: setattr(layer.get_base_layer().weight, "data", torch.ones(5, 8)),
    "bias": lambda layer: setattr(layer.get_base_layer(), "bias", None),
    "trained bias": lambda layer: layer.get_base_layer().bias.requires_grad_(True),
    "type": lambda layer: layer.double(),
    "class": lambda layer: setattr(layer.get_base_layer(), "__class__", Odd),
    "hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "hook of base": lambda layer: layer.get_base_layer().register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_show_in_the_state(change: str) -> None:
    layer = lora(lora_dropout=0.1)
    layer.get_base_layer().requires_grad_(False)
    before = state_of(layer)
    assert state_of(layer) == before
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1)  # a step of an optimizer is no such change
        layer.get_base_layer().weight.add_(1)
    assert state_of(layer) == before
    keep = CHANGES[change](layer)
    assert state_of(layer) != before
    del keep
