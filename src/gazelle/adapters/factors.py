"""An adapter as the low-rank factors that it consists of, for formats that keep nothing else.

Shape legend: N outputs, K inputs, R rank, V rows of an embedding, H its columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError


@dataclass(frozen=True)
class Factors:
    """What is added to one layer's weight: scale · b·a, for an embedding scale · (b·a)ᵀ.

    Attributes:
        path: the layer in the plain model, such as "model.layers.0.self_attn.q_proj".
        a: [R, K], for an embedding [R, V]; float32 on the CPU.
        b: [N, R], for an embedding [H, R].
        scale: a number.
        embedding: whether the layer is one.
    """

    path: str
    a: Tensor
    b: Tensor
    scale: float
    embedding: bool

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]


def lora_factors(model: Any, adapter: str | None = None) -> list[Factors]:
    """The factors of the adapters that are active, layer by layer; several on one layer are joined, side by side.

    Args:
        model: with adapters of PEFT's.
        adapter: the one to read instead, active or not.

    Raises:
        OptionError: the model has no adapter, or it is switched off.
        ModelError: it is more than factors (DoRA, biases, modules trained in full, trained tokens), or merged already.
    """
    if not hasattr(model, "peft_config"):
        raise OptionError("the model has no adapter to export", where=type(model).__name__, found="a model alone",
                          expected="a model with a LoRA adapter", fix="export the model itself")
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    for name in active if adapter is None else [adapter]:
        if getattr(model.peft_config[name], "bias", "none") != "none":
            raise _more("biases trained with the adapter", f"adapter {name!r}")
    with torch.no_grad():
        found = [factors for path, module in _outermost(unwrap(model), "")
                 for factors in _factors(module, path, adapter)]
    if not found:
        raise OptionError("the model has no adapter to export", where="model", found="no layer with an active adapter",
                          expected="an adapter that is switched on", fix="model.set_adapter(name) or enable it again")
    return found


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """PEFT's modules, without those inside of them."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if type(child).__module__.startswith("peft."):
            yield inner, child
        else:
            yield from _outermost(child, inner)


def is_adapted(module: Any) -> bool:
    """Whether PEFT has put LoRA on a layer."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _factors(layer: Any, path: str, adapter: str | None) -> Iterator[Factors]:
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(layer, AuxiliaryTrainingWrapper):
        taken = layer.active_adapters and not layer.disable_adapters if adapter is None else adapter in layer._adapters
        if taken:
            raise _more("a module trained in full, or tokens of its own", path)
        return
    if not isinstance(layer, LoraLayer):
        raise _more(f"an adapter of the kind {type(layer).__name__}", path)
    asked = layer.active_adapters if adapter is None else [adapter]
    names = [name for name in asked if name in layer.lora_A or name in layer.lora_embedding_A]
    if layer.merged:
        raise ModelError("the adapter has been merged into its base", where=path, found="merged weights",
                         expected="an adapter beside its base", fix="call model.unmerge_adapter() first")
    if (layer.disable_adapters and adapter is None) or not names:
        return
    if any(name in layer.lora_variant for name in names):
        raise _more("DoRA or another variant of LoRA", path)
    if any(layer.lora_bias.get(name) for name in names):
        raise _more("biases in its factors", path)
    embedding = isinstance(layer.get_base_layer(), nn.Embedding)
    if layer.fan_in_fan_out or not (embedding or names[0] in layer.lora_A):
        raise _more(f"an adapter on a {type(layer.get_base_layer()).__name__}", path)
    pairs = [(layer.lora_embedding_A[name], layer.lora_embedding_B[name]) if embedding
             else (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
    parts = [(a.detach().to("cpu", torch.float32), b.detach().to("cpu", torch.float32), float(layer.scaling[name]))
             for name, (a, b) in zip(names, pairs, strict=True)]
    if len(parts) == 1:
        yield Factors(path, *parts[0], embedding)
    else:
        yield Factors(path, torch.cat([a for a, _, _ in parts]), torch.cat([b * scale for _, b, scale in parts], 1),
                      1.0, embedding)


def _more(what: str, where: str) -> ModelError:
    return ModelError(f"the adapter is more than low-rank factors: {what}", where=where, found=what,
                      expected="plain LoRA or rsLoRA on linear and embedding layers",
                      fix="export the merged model instead")
