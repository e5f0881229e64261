"""LoRA factors written into the border of W̃ = [[W, sB], [A, 0]]: one kernel for all adapters, or copies.

GB/s count what has to be read and written.
Alone: python -m benchmarks.ops.border
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.ops._timing import DTYPE, ON_GPU, adapters, case, random, show
from torch import Tensor

from gazelle.kernels.border import fill_borders
from gazelle.kernels.factors import Factors

# (name, outputs of each part, inputs), and adapter columns: of each part, and of the matrix.
SHAPES = (("8B qkv", (4096, 1024, 1024), 4096), ("8B gate and up", (14336, 14336), 4096), ("8B down", (4096,), 14336)) \
    if ON_GPU else (("SmolLM2 qkv", (576, 192, 192), 576), ("SmolLM2 down", (576,), 1536))
BORDER = 64


def by_slices(a: Tensor, b: Tensor, parts: list[Factors]) -> None:
    """`fill_borders` in plain PyTorch."""
    a[:], b[:] = 0, 0
    for part in parts:
        a[part.columns] = part.a
        b[part.rows, part.columns] = part.b * part.scale


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for name, parts, K in SHAPES:
        N = sum(parts)
        matrix = random(N + BORDER, K + BORDER)
        found = adapters(parts, K)
        size = sum(part.a.nbytes + part.b.nbytes for part in found)
        size += (BORDER * K + N * BORDER) * DTYPE.itemsize
        for label, one in (("gazelle", fill_borders), ("eager", by_slices)):
            yield case("border", f"{name}, {label}", size, one, matrix[N:, :K], matrix[:N, K:], found)


if __name__ == "__main__":
    show(cases())
