"""Hugging Face's linear layers, plain, quantised and with LoRA, as the engine sees them."""

from typing import Any

import torch
from torch import nn

from gazelle.engine.linear import Adapter, Linear
from gazelle.models.families import UnsupportedError
from gazelle.quantize.bnb import is_quantized_linear
from gazelle.quantize.storage import storage_of


def read_linear(module: Any) -> Linear:
    """A linear layer with the adapter that is active now.

    Raises:
        UnsupportedError: naming what the engine does not have.
    """
    base = base_linear(module)
    adapter = None
    if _has_lora(module):
        if module.disable_adapters and module.merged:
            module.unmerge()  # as its own forward pass does
        adapter = _adapter(module)
    if type(base) is not nn.Linear and not is_quantized_linear(base):
        raise UnsupportedError(f"a linear layer of type {type(base).__module__}.{type(base).__qualname__}")
    if not is_quantized_linear(base) and type(base.weight.data) is not torch.Tensor:
        raise UnsupportedError(f"a weight of type {type(base.weight.data).__name__}")
    if hooked(module) or hooked(base):
        raise UnsupportedError("hooks on its linear layers")
    return Linear(storage_of(base), base.bias, adapter)


def base_linear(module: Any) -> Any:
    """The linear layer inside an adapter, or the layer itself."""
    return module.get_base_layer() if _has_lora(module) else module


def state_of(module: Any, *, mode: bool = True) -> tuple[Any, ...]:
    """What decides how `read_linear` reads a module: if it differs, the module has to be read again.

    Args:
        module: the linear layer.
        mode: with what differs between training and evaluation.
    """
    if not _has_lora(module):
        return _state_of_base(module), hooked(module)
    adapters = tuple((*_state_of(module.lora_A[name].weight), *_state_of(module.lora_B[name].weight),
                      module.scaling[name], _dropout(module, name) if mode else None)
                     for name in module.active_adapters if name in module.lora_A)
    return (_state_of_base(module.get_base_layer()), hooked(module), module.disable_adapters,
            tuple(module.merged_adapters), adapters)


def hooked(module: Any) -> bool:
    """True if something happens around a module's forward pass that the engine, which does not call it, would miss."""
    if "forward" in module.__dict__:  # put there by accelerate, to move weights between devices
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values(),
             *module._backward_pre_hooks.values())
    # transformers leaves its own behind once hidden states or attentions were asked for.
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _state_of_base(module: Any) -> tuple[Any, ...]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor):
        return (id(weight),)
    return type(module), weight.data_ptr(), *_state_of(weight), *_state_of(bias), hooked(module)


def _state_of(parameter: torch.Tensor | None) -> tuple[int, bool]:
    return id(parameter), parameter is not None and parameter.requires_grad


def _has_lora(module: Any) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "lora_A")


def _adapter(module: Any) -> Adapter | None:
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise UnsupportedError("several adapters active at a time")
    name = active[0]
    if name in module.lora_variant:
        raise UnsupportedError(f"{type(module.lora_variant[name]).__name__.removesuffix('LinearVariant')} adapters")
    if module.lora_B[name].bias is not None:
        raise UnsupportedError("adapters with a bias (lora_bias)")
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]),
                   _dropout(module, name))


def _dropout(module: Any, name: str) -> float:
    dropout = module.lora_dropout[name]
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0
