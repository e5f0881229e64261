"""Keeps a loaded model in fewer bits, in place."""

from typing import Any

import torch

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import ModelError, OptionError, nearest
from gazelle.quantize.bnb import (
    forbid_repacking,
    hush_int8_casts,
    is_four_bits,
    is_quantized_linear,
    quantize_linears,
)

_CASTS = {"float16": torch.float16, "fp16": torch.float16, "half": torch.float16, "bfloat16": torch.bfloat16,
          "bf16": torch.bfloat16}
_BITS = ("nf4", "int8")


def quantize_model(model: Any, dtype: "str | torch.dtype") -> None:
    """Cast a model to 16 bits, or let bitsandbytes keep its linear layers, in place.

    Args:
        model: with or without an adapter. With "nf4" and "int8" an adapter stays as it is beside the quantised
            weights, as after training on a quantised model.
        dtype: torch.float16 or torch.bfloat16, or "nf4" (https://arxiv.org/abs/2305.14314) or "int8"
            (https://arxiv.org/abs/2208.07339). The head and the embedding stay in the model's own type.

    Raises:
        OptionError: no such type.
        ModelError: the model is quantised already, or its adapter is merged into it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _CASTS and name not in _BITS:
        raise OptionError("a model cannot be quantised to this in memory", where="dtype", found=dtype,
                          expected="torch.float16, torch.bfloat16, nf4 or int8; GGUF, fp8, AWQ and GPTQ are exports",
                          fix=nearest(name, (*_CASTS, *_BITS)))
    base = unwrap(model)
    if any(is_quantized_linear(module) for module in base.modules()):
        raise ModelError("the model is quantised already", where="quantize", found="linear layers of bitsandbytes",
                         expected="weights in 16 or 32 bits", fix="load it with load_in_4bit=False, then quantise it")
    if name in _CASTS:
        model.to(_CASTS[name])
        base.config.dtype = _CASTS[name]
        return
    if any(getattr(module, "merged", False) is True for module in base.modules()):
        raise ModelError("the adapter is merged into the weights", where="quantize", found="a merged adapter",
                         expected="an adapter beside the weights", fix="call model.unmerge_adapter() first")
    from transformers import BitsAndBytesConfig

    hush_int8_casts()
    compute = next(parameter.dtype for parameter in base.parameters() if parameter.is_floating_point())
    quantize_linears(base, base.get_output_embeddings(), four=name == "nf4", compute=compute)
    forbid_repacking(base)
    _tell_adapters(base)
    settings = {"load_in_8bit": True} if name == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute}
    base.config.quantization_config = BitsAndBytesConfig(**settings)
    base.is_quantized = True
    for owner in (base, model):
        if hasattr(owner, "gazelle_loading"):
            owner.gazelle_loading = owner.gazelle_loading | {
                "load_in_4bit": name == "nf4", "load_in_8bit": name == "int8", "quant_method": "nf4"}


def _tell_adapters(base: Any) -> None:
    """Give PEFT's layers the class that they have on quantised weights: it knows how to merge into these."""
    for module in base.modules():
        if type(module).__module__ == "peft.tuners.lora.layer" and is_quantized_linear(module.get_base_layer()):
            from peft.tuners.lora import bnb

            module.__class__ = bnb.Linear4bit if is_four_bits(module.get_base_layer()) else bnb.Linear8bitLt
