"""AWQ on a decoder layer: what scales the inputs of each linear layer up is divided out where they come from.

A layer computes the same before and after, up to rounding. Shapes: N outputs and K inputs of a linear layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gazelle.base.errors import ModelError
from gazelle.export.layers import Inputs
from gazelle.models.families import FAMILIES
from gazelle.quantize.awq import input_scales
from gazelle.quantize.groups import Grid


def check_family(config: Any) -> None:
    """Raise `ModelError` if it is not known what comes before each linear layer of a family."""
    if config.model_type not in FAMILIES:
        raise ModelError("AWQ has to know what comes before each linear layer", where="awq", found=config.model_type,
                         expected=", ".join(FAMILIES), fix='quantise with "gptq", which takes any family')


def smooth(layer: nn.Module, fed: list[Inputs], config: Any, grid: Grid) -> None:
    """Scale the weights of a layer, and `fed` with them, in place.

    Args:
        layer: with its weights in float32.
        fed: what its linear layers are fed.
        config: of the decoder itself.
        grid: what the weights are going to be rounded to.
    """
    family = FAMILIES[config.model_type]
    norms = family.norm_names()
    by_name = {name.rpartition(".")[2]: inputs for inputs in fed for name in inputs.names}
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    # The last of several outputs first: up and v are rounded with the scales of down and o in them.
    _through_rows(layer, by_name["down_proj"], mlp.get_submodule(family.gate_up[-1]), grid)
    _through_rows(layer, by_name["o_proj"], attention.get_submodule(family.qkv[-1]), grid,
                  kv_heads=config.num_key_value_heads, heads=config.num_attention_heads)
    for name, norm in ((family.qkv[0], norms["attention"]), (family.gate_up[0], norms["mlp"])):
        _through_norm(layer, by_name[name], layer.get_submodule(norm), family.norm_offset, grid)


def _through_rows(layer: nn.Module, inputs: Inputs, source: Any, grid: Grid, kv_heads: int = 1, heads: int = 1) -> None:
    """Inputs that are made from the last rows of another linear layer, each of which feeds heads / kv_heads of them."""
    alike = inputs.magnitude.view(kv_heads, heads // kv_heads, -1).mean(1, keepdim=True)
    level = alike.expand(kv_heads, heads // kv_heads, -1).flatten()
    scales = input_scales(_stacked(layer, inputs), inputs.gram, level, grid)
    rows = scales.view(kv_heads, heads // kv_heads, -1)[:, 0].flatten()
    source.weight.data[-len(rows):] /= rows[:, None]
    if source.bias is not None:
        source.bias.data[-len(rows):] /= rows
    _scale(layer, inputs, scales)


def _through_norm(layer: nn.Module, inputs: Inputs, norm: Any, offset: float, grid: Grid) -> None:
    """Inputs that come out of a norm."""
    scales = input_scales(_stacked(layer, inputs), inputs.gram, inputs.magnitude, grid)
    before = norm.weight.data + offset
    # The norm is going to be kept in 16 bits: the scales are what its rounded weight makes of them.
    norm.weight.data.copy_((before / scales - offset).to(grid.dtype))
    after = norm.weight.data + offset
    _scale(layer, inputs, torch.where((after != 0) & (before != 0), before / after, scales))


def _stacked(layer: nn.Module, inputs: Inputs) -> Tensor:
    modules: list[Any] = [layer.get_submodule(name) for name in inputs.names]
    return torch.cat([module.weight.data for module in modules])


def _scale(layer: nn.Module, inputs: Inputs, scales: Tensor) -> None:
    for name in inputs.names:
        layer.get_submodule(name).weight.data *= scales  # type: ignore[operator]
    inputs.gram /= scales[:, None] * scales
    inputs.magnitude /= scales.abs()
