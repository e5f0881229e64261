"""The weights that a model with an adapter amounts to, one module at a time and without touching the model.

Every formula is PEFT's: the update of plain LoRA, and for DoRA and its kin the variant's own `merge_safe`.
"""

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError
from gazelle.quantize.bnb import dequantize_linear, is_quantized_linear

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@torch.no_grad()  # of a generator: while it runs, and not while it waits, or is never asked again
def merged_tensors(model: nn.Module, only: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each weight and persistent buffer of the plain model inside `model`, merged and dequantised.

    Merged and 8-bit weights come in float32, the others as they are kept. Tied weights come once for each name. Only
    one merged weight is in memory at a time if the caller lets go of the last.

    Args:
        model: a Hugging Face model, with or without a PEFT adapter.
        only: names of the weights wanted; others are not computed.

    Raises:
        ModelError: an adapter of a kind that cannot be merged.
    """
    yield from _walk(unwrap(model), "", only)


def _walk(module: nn.Module, path: str, only: Container[str] | None) -> Iterator[tuple[str, Tensor]]:
    if _stands_for_another(module):
        if only is None or f"{path}.weight" in only:
            for name, tensor in _resolved(module, path):
                yield f"{path}.{name}", tensor.detach()
        return
    prefix = f"{path}." if path else ""
    for name, tensor in _direct(module):
        if only is None or prefix + name in only:
            yield prefix + name, tensor.detach()
    for name, child in module.named_children():
        yield from _walk(child, prefix + name, only)


def _direct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in module._parameters.items():
        if weight is not None:
            yield name, weight
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _stands_for_another(module: nn.Module) -> bool:
    return is_quantized_linear(module) or type(module).__module__.startswith("peft.")


def _resolved(module: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the plain module that a quantised or adapted one stands for."""
    if is_quantized_linear(module):
        return _linear(dequantize_linear(module), module.bias)
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        chosen = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
        return iter(chosen.state_dict().items())
    if isinstance(module, TrainableTokensWrapper):
        layer = module.token_adapter
        inner = layer.get_base_layer()
        return _linear(layer.get_merged_weights(layer.active_adapters), getattr(inner, "bias", None))
    if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
        inner = module.get_base_layer()
        if isinstance(inner, nn.Linear | nn.Embedding) or type(inner).__name__ == "Conv1D":
            return _lora(module)
    raise ModelError("this kind of adapter cannot be merged", where=path, found=type(module).__name__,
                     expected="LoRA, rsLoRA or DoRA on linear and embedding layers",
                     fix='save the adapter alone with save_method="lora"')


def _linear(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    yield "weight", weight
    if bias is not None:
        yield "bias", bias


def _lora(layer: "LoraLayer | Any") -> Iterator[tuple[str, Tensor]]:
    base = layer.get_base_layer()
    weight, bias = dequantize_linear(base), getattr(base, "bias", None)
    if layer.merged or layer.disable_adapters:
        return _linear(weight, bias)
    adapters = [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
    weight = weight.float()
    for name in adapters:
        if name in layer.lora_variant:
            caches = dict(layer._caches)  # merge_safe leaves notes for a later unmerge
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
            layer._caches = caches
        else:
            weight = weight + _update(layer, name)
        if layer.lora_bias.get(name):
            if bias is None:
                raise ModelError("the adapter has biases where the model has none", where=type(base).__name__,
                                 found="lora_bias=True", expected="layers with a bias",
                                 fix='save the adapter alone with save_method="lora"')
            bias = bias.float() + layer.lora_B[name].bias.float() * layer.scaling[name]
    return _linear(weight, bias)


def _update(layer: Any, name: str) -> Tensor:
    """s·B·A in float32, whatever the factors are kept in; PEFT rounds it to their type."""
    if name in layer.lora_embedding_A:
        return (layer.lora_embedding_B[name].float() @ layer.lora_embedding_A[name].float()).T * layer.scaling[name]
    update = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
    return update.T if layer.fan_in_fan_out else update
