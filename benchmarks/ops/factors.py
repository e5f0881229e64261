"""Gradients of LoRA factors, dzᵀx and s·dyᵀz, added where they are gathered: one kernel, or a product for each.

GB/s count what has to be read and written.
Alone: python -m benchmarks.ops.factors
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.ops._timing import DTYPE, ON_GPU, adapters, case, random, show
from torch import Tensor

from gazelle.kernels.factors import Factors, add_factor_gradients

# (name, outputs of each part, inputs), and adapter columns: of each part, and of the matrices.
SHAPES = (("8B qkv", (4096, 1024, 1024), 4096), ("8B gate and up", (14336, 14336), 4096), ("8B down", (4096,), 14336)) \
    if ON_GPU else (("SmolLM2 qkv", (576, 192, 192), 576), ("SmolLM2 down", (576,), 1536))
BORDER = 64
TOKENS = 8192 if ON_GPU else 512


def by_products(dy: Tensor, x: Tensor, z: Tensor, dz: Tensor, parts: list[Factors]) -> None:
    """`add_factor_gradients` in plain PyTorch."""
    for part in parts:
        part.a.add_(dz[:, part.columns].t() @ x)
        part.b.add_(dy[:, part.rows].t() @ z[:, part.columns], alpha=part.scale)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for name, parts, K in SHAPES:
        # As the engine lays them: gradient and dz side by side, the input with room for z.
        d, x, z = random(TOKENS, sum(parts) + BORDER), random(TOKENS, K), random(TOKENS, BORDER)
        dy, dz = d[:, : sum(parts)], d[:, sum(parts) :]
        found = adapters(parts, K)
        size = (d.numel() + x.numel() + z.numel()) * DTYPE.itemsize
        size += 2 * sum(part.a.nbytes + part.b.nbytes for part in found)
        for label, one in (("gazelle", add_factor_gradients), ("eager", by_products)):
            yield case("factors", f"{name}, {label}", size, one, dy, x, z, dz, found)


if __name__ == "__main__":
    show(cases())
