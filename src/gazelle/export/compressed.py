"""Weights in the format of the compressed-tensors library, which vLLM and transformers read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.base.optional import require
from gazelle.quantize.groups import Steps

GROUPS = (128, 64, 32)  # inputs that share a step, in order of preference; vLLM's kernels have these


@dataclass(frozen=True)
class Format:
    """How linear layers are kept: the library's class for it, its scheme, and config.json's entry."""

    codec: Any
    scheme: Any
    config: dict[str, Any]

    def pack(self, weight: Tensor, steps: Steps) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a layer, by name, and the weight that the library makes of them.

        Args:
            weight: [N, K], numbers that `steps` allow; for fp8 any.
            steps: [N, G]; for fp8 one a row.
        """
        state = {"weight": weight, "weight_scale": steps.step}
        if not self.scheme.weights.symmetric:
            state["weight_zero_point"] = steps.zero
        parts = self.codec.compress(state, self.scheme)
        return parts, self.codec.decompress(parts, self.scheme)["weight"]


def group_for(widths: dict[str, int]) -> int:
    """Inputs that share a step: the most that divides the inputs of every linear layer.

    Raises:
        ModelError: none does.
    """
    for group in GROUPS:
        if all(width % group == 0 for width in widths.values()):
            return group
    name, width = next((name, width) for name, width in widths.items() if width % GROUPS[-1])
    raise ModelError("this layer cannot be kept in 4 bits", where=name, found=f"{width} inputs",
                     expected=f"a multiple of {GROUPS[-1]}", fix='export with "fp8" or without quantisation')


def format_of(method: str, *, group: int, act_order: bool, kept_whole: list[str]) -> Format:
    """The format of a method.

    Args:
        method: "fp8" (a step a row, inputs rounded token by token as they come), "awq" or "gptq" (4 bits).
        group: inputs that share a step, for the latter two.
        act_order: noted beside the weights; it changes nothing in how they are read.
        kept_whole: linear layers that are not quantised.

    Raises:
        MissingDependencyError: compressed-tensors is not installed.
    """
    require("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    if method == "fp8":
        name, inputs = "float-quantized", QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    else:
        name, inputs = "pack-quantized", None
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=method == "gptq", strategy="group",
                                   group_size=group, actorder="weight" if method == "gptq" and act_order else None)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=name)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=name, quantization_status="compressed",
                                ignore=kept_whole)
    return Format(BaseCompressor.get_value_from_registry(name), scheme, config.model_dump(mode="json"))


def fp8_steps(weight: Tensor, dtype: torch.dtype) -> Steps:
    """A step a row [N, 1] that brings its largest number to e4m3's."""
    largest = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    step = largest.clamp(min=torch.finfo(dtype).tiny).to(dtype)
    return Steps(step, torch.zeros_like(step, dtype=torch.int8))
