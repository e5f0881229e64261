"""bitsandbytes' 4-bit and 8-bit linear layers: recognise them and get their weights back.

Shapes: N outputs, K inputs.
"""

import copy
import logging
import sys
from typing import Any

from torch import Tensor, nn

from gazelle.base.errors import ModelError


def is_quantized_linear(module: nn.Module) -> bool:
    """True for bitsandbytes' `Linear4bit` and `Linear8bitLt`. Does not import bitsandbytes."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def is_four_bits(module: nn.Module) -> bool:
    """True for `Linear4bit`."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def dequantize_linear(module: Any) -> Tensor:
    """The weight [N, K] of a linear layer, bit-equal to what bitsandbytes makes of it; a plain layer's own tensor.

    4 bits give the dtype that was quantised, 8 bits float32.

    Raises:
        ModelError: the layer's weight is not on a device yet, so it has not been quantised.
    """
    if not is_quantized_linear(module):
        return module.weight.data
    from bitsandbytes import functional

    if is_four_bits(module):
        return functional.dequantize_4bit(*four_bits(module))
    return functional.int8_vectorwise_dequant(*eight_bits(module))


def four_bits(module: Any) -> tuple[Tensor, Any]:
    """The packed weight of a `Linear4bit` and its `QuantState`, as on a GPU also after it was repacked for a CPU.

    Raises:
        ModelError: as above.
    """
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise ModelError("a 4-bit layer has not been quantised yet", where=type(module).__name__,
                         found="no quantisation state", expected="a loaded model", fix="move the model to a device")
    return _plain_layout(module.weight.data, state)


def eight_bits(module: Any) -> tuple[Tensor, Tensor]:
    """The weight [N, K] int8 of a `Linear8bitLt` and the largest number of each row [N] in float32.

    Raises:
        ModelError: as above.
    """
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    if scales is None:
        raise ModelError("an 8-bit layer has not been quantised yet", where=type(module).__name__, found="no scales",
                         expected="a loaded model", fix="move the model to a device")
    return module.weight.data, scales.to(module.weight.device)


def pack_nf4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [N, K] in NF4 with quantised scales, as bitsandbytes' checkpoints keep it.

    Returns:
        The tensors by what follows the name of their layer, such as "weight.absmax"; and the numbers that are read
        back, in the type of `weight`.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    parts = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return parts, functional.dequantize_4bit(packed, state)


def forbid_repacking(model: nn.Module) -> None:
    """Keep 4-bit weights as they were loaded.

    On CPUs with AVX512-BF16, bitsandbytes otherwise repacks them in place at the first evaluation: block scales are
    rounded to bfloat16, so training goes on with another model than before, and odd shapes fail.
    """
    module: Any
    for module in model.modules():
        if is_quantized_linear(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _plain_layout(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A weight and its state as bitsandbytes dequantises them, also after it repacked them for a CPU."""
    if not getattr(state, "packing_format_for_cpu", False):
        return packed, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # quantising the scales once more would only add error
    packed, state = _convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax = scales
    return packed, state


def hush_int8_casts() -> None:
    """Stop bitsandbytes from logging, at every layer of every step, that 8-bit layers compute in float16."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_a_cast not in log.filters:
        log.addFilter(_not_a_cast)


def _not_a_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def quantize_linears(model: nn.Module, head: nn.Module, *, four: bool, compute: Any) -> None:
    """Exchange the linear layers of `model` for bitsandbytes', in place, one at a time.

    Args:
        model: plain, or with adapters of PEFT, whose base layers are exchanged.
        head: stays as it is.
        four: `Linear4bit` in NF4 with quantised scales, or else `Linear8bitLt`.
        compute: what four-bit layers compute in.
    """
    import bitsandbytes as bnb

    left = {id(module) for module in head.modules()}
    chosen = [(module, name, child) for path, module in model.named_modules() for name, child in module.named_children()
              if type(child) is nn.Linear and id(child) not in left and not _trained(path)]
    for module, name, linear in chosen:
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        new: Any
        if four:
            new = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=compute, compress_statistics=True,
                                    quant_type="nf4", device="meta")
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True,
                                           quant_type="nf4", module=new)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        device = linear.weight.device
        setattr(module, name, new.to(device).train(linear.training))


def _trained(path: str) -> bool:
    """True inside an adapter's own modules."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in path.split("."))
