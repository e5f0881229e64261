"""What this machine has. Imports torch only when asked."""

import functools
import os
import platform
import sys
from typing import TYPE_CHECKING

import psutil

from gazelle.base.errors import OptionError

if TYPE_CHECKING:
    import torch


@functools.cache
def default_device() -> str:
    """The device a model is loaded on when the caller names none: "cuda:0", "xpu:0", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():  # ROCm builds answer here too
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu:0"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def is_bfloat16_supported() -> bool:
    """True if the default device computes in bfloat16 at full speed. A CPU emulates it: there the answer is False."""
    import torch

    kind = default_device().split(":")[0]
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind in ("xpu", "mps")


def default_dtype() -> "torch.dtype":
    """bfloat16 where the device has it, float16 on older GPUs, float32 on a CPU (16-bit is far slower there)."""
    import torch

    if default_device() == "cpu":
        return torch.float32
    return torch.bfloat16 if is_bfloat16_supported() else torch.float16


def check_device(device: str) -> None:
    """Raise `OptionError` if `device` ("cuda", "cuda:1", "cpu", ...) is not on this machine."""
    import torch

    kind, _, index = device.partition(":")
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
               "xpu": torch.xpu.device_count() if hasattr(torch, "xpu") else 0}
    if kind not in present or (index and not index.isdecimal()):
        raise OptionError("no such kind of device", where="device_map", found=device,
                          expected="one of " + ", ".join(present), fix="leave device_map out to let gazelle choose")
    if int(index or 0) >= present[kind]:
        raise OptionError(f"this machine has {present[kind] or 'no'} {kind} device{'s' * (present[kind] != 1)}"
                          " that torch can use", where="device_map", found=device,
                          expected=f"a device that is there, such as {default_device()}",
                          fix="run `gazelle doctor`, or leave device_map out to let gazelle choose")


def device_name(device: str) -> str:
    """What people call the device: "NVIDIA H200", or the processor's architecture."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def memory_in_use(device: str) -> int:
    """Bytes in use now: allocated by torch on an accelerator, resident in this process on a CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """Highest bytes in use so far, measured as in `memory_in_use`."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_memory(device: str) -> int:
    """Bytes the device has in all."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
