"""What adapters add to a product made without them, y + zbᵀ + residual: one kernel, or a product and a sum.

GB/s count what has to be read and written.
Alone: python -m benchmarks.ops.low_rank
"""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.ops._timing import DTYPE, ON_GPU, case, random, show
from torch import Tensor

from gazelle.kernels.low_rank import add_low_rank

# (name, outputs, whether there is a residual)
SHAPES = (("8B gate and up", 28672, False), ("8B down, residual", 4096, True)) if ON_GPU \
    else (("SmolLM2 gate and up", 3072, False), ("SmolLM2 down, residual", 576, True))
BORDER = 64
TOKENS = 8192 if ON_GPU else 512


def by_products(y: Tensor, z: Tensor, b: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    """`add_low_rank` in plain PyTorch."""
    y = torch.addmm(y, z, b.t())
    return out.copy_(y if residual is None else y.add_(residual))


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for name, N, adds in SHAPES:
        y, z, b = random(TOKENS, N), random(TOKENS, BORDER), random(N, BORDER)
        out, residual = random(TOKENS, N + BORDER)[:, :N], random(TOKENS, N) if adds else None
        size = ((3 if adds else 2) * y.numel() + z.numel() + b.numel()) * DTYPE.itemsize
        for label, one in (("gazelle", add_low_rank), ("eager", by_products)):
            yield case("low_rank", f"{name}, {label}", size, one, y, z, b, residual, out)


if __name__ == "__main__":
    show(cases())
