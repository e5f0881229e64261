"""Reads the options of `load_model`, and says what is wrong with them before anything is loaded."""

from typing import TYPE_CHECKING, Any

from gazelle.base.device import check_device, default_device, default_dtype
from gazelle.base.errors import OptionError, nearest

if TYPE_CHECKING:
    import torch

_DTYPES = ("bfloat16", "float16", "float32")
_PLACES = ("auto", "balanced", "balanced_low_0", "sequential")


def only_one(dtype: Any, torch_dtype: Any) -> Any:
    """Whichever of the two names of `dtype` was used."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise OptionError("dtype and torch_dtype are two names of one option", where="dtype", found=torch_dtype,
                          expected=f"{dtype}, or only one of them", fix="leave torch_dtype out")
    return dtype if dtype is not None else torch_dtype


def bits(four: bool | None, eight: bool, full: bool, quant_method: str) -> int:
    """How many bits the linear weights are kept in: 4, 8, or 0 for unquantised."""
    if quant_method not in ("nf4", "fp4"):
        raise OptionError("no such way to quantise", where="quant_method", found=quant_method, expected="nf4 or fp4",
                          fix="leave quant_method out for nf4")
    if four and eight:
        raise OptionError("a model is kept in 4 bits or in 8, not both", where="load_in_4bit, load_in_8bit",
                          found="both True", expected="one of them", fix="leave one of them out")
    if full and (four or eight):
        raise OptionError("quantised weights cannot be trained", where="full_finetuning",
                          found="full_finetuning with " + ("load_in_4bit" if four else "load_in_8bit"),
                          expected="full fine-tuning on unquantised weights", fix="leave out the quantisation")
    if eight:
        return 8
    return 0 if full or four is False else 4


def device_map(place: "str | torch.device | dict[str, Any] | None") -> Any:
    """`device_map` for transformers; every device named in it is there."""
    if isinstance(place, dict):
        for device in place.values():
            check_device(f"cuda:{device}" if isinstance(device, int) else str(device))
        return place
    if place in _PLACES:
        return place
    device = default_device() if place is None else str(place)
    check_device(device)
    return {"": device}


def dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | str":
    """The torch dtype of any of its spellings, or "auto"."""
    import torch

    if dtype is None:
        return default_dtype()
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
            str(dtype), str(dtype).removeprefix("torch."))
    if name == "auto":
        return "auto"
    if name not in _DTYPES:
        raise OptionError("a model cannot compute in this type", where="dtype", found=dtype,
                          expected="auto, " + ", ".join(_DTYPES), fix=nearest(name, ["auto", *_DTYPES]))
    return getattr(torch, name)
