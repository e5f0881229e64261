"""Which implementation of an op a tensor gets: a Triton kernel on a GPU, the plain-PyTorch reference elsewhere."""

import functools
import importlib.util

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """True if triton is installed. It is imported only by the kernels that run on it."""
    return importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """True if `x` is on a device that Triton compiles for. ROCm's tensors are "cuda" tensors too."""
    return x.device.type in ("cuda", "xpu") and has_triton()
