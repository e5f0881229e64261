"""Which type the parts of a model are kept and computed in, as scripts ask for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.base.log import say_once
from gazelle.models import options


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Types of a model's parts; None leaves a part as it is.

    Attributes:
        param_dtype: of frozen weights, and so of the computation. Quantised weights stay as they are.
        reduce_dtype: of what is trained. A gradient has its weight's type, so it is summed in this one.
        buffer_dtype: of buffers, but for the frequencies of rotary positions, which lose places in 16 bits.
        keep_batchnorm_fp32: leave batch norms in float32.
    """

    param_dtype: "torch.dtype | str | None" = None
    reduce_dtype: "torch.dtype | str | None" = torch.float32
    buffer_dtype: "torch.dtype | str | None" = None
    keep_batchnorm_fp32: bool = True


def set_mixed_precision(model: Any, config: MixedPrecisionConfig) -> Any:
    """Bring a model's parts to these types, in place; returns the model.

    Args:
        model: before the trainer is made; with an adapter, so that it is known what is trained.
        config: the types.

    Raises:
        OptionError: a type that a model cannot compute in.
    """
    kinds = {name: None if (kind := getattr(config, name)) is None else options.dtype(kind)
             for name in ("param_dtype", "reduce_dtype", "buffer_dtype")}
    if "auto" in kinds.values():
        raise OptionError("the type of a part has to be named", where="MixedPrecisionConfig", found="auto",
                          expected="float32, bfloat16 or float16", fix="leave it out to keep the part as it is")
    adapted = hasattr(model, "peft_config")
    if not adapted and all(parameter.requires_grad for parameter in model.parameters()):
        say_once("every weight is trained, so all are kept in param_dtype; for float32 weights computed in 16 bits "
                 "set bf16=True or fp16=True in SFTConfig")
    with torch.no_grad():
        for module in model.modules():
            if config.keep_batchnorm_fp32 and isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            for parameter in module.parameters(recurse=False):
                kind = kinds["reduce_dtype" if adapted and parameter.requires_grad else "param_dtype"]
                if kind is not None and type(parameter) is nn.Parameter and parameter.is_floating_point():
                    parameter.data = parameter.data.to(kind)
            for name, buffer in module.named_buffers(recurse=False):
                if kinds["buffer_dtype"] is not None and buffer.is_floating_point() and "inv_freq" not in name:
                    setattr(module, name, buffer.to(kinds["buffer_dtype"]))
    if kinds["param_dtype"] is not None:
        unwrap(model).config.dtype = kinds["param_dtype"]
    return model
