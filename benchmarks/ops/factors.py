"""Gradients of LoRA factors added where they are gathered: one kernel for a projection, or a slice and a sum for each.

GB/s count what has to be read and written.
Alone: python -m benchmarks.ops.factors
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.ops._timing import ON_GPU, case, random, show
from torch import Tensor

from gazelle.kernels.factors import Factors, add_factor_gradients

# (name, outputs of each part, inputs), and adapter columns: of each part, and of the matrices.
SHAPES = (("8B qkv", (4096, 1024, 1024), 4096), ("8B gate and up", (14336, 14336), 4096), ("8B down", (4096,), 14336)) \
    if ON_GPU else (("SmolLM2 qkv", (576, 192, 192), 576), ("SmolLM2 down", (576,), 1536))
RANK, BORDER = 16, 64


def by_slices(dA: Tensor, dB: Tensor, parts: list[Factors]) -> None:
    """`add_factor_gradients` in plain PyTorch."""
    for part in parts:
        part.a += dA[part.columns]
        part.b += dB[part.rows, part.columns] * part.scale


def targets(parts: tuple[int, ...], inputs: int) -> Iterator[Factors]:
    row = 0
    for number, n in enumerate(parts):
        columns = slice(number * RANK, number * RANK + RANK)
        yield Factors(random(RANK, inputs).float(), random(n, RANK).float(), 2.0, slice(row, row + n), columns)
        row += n


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for name, parts, K in SHAPES:
        dA, dB = random(BORDER, K).float(), random(sum(parts), BORDER).float()
        found = list(targets(parts, K))
        size = 3 * sum(part.a.nbytes + part.b.nbytes for part in found)
        for label, one in (("gazelle", add_factor_gradients), ("eager", by_slices)):
            yield case("factors", f"{name}, {label}", size, one, dA, dB, found)


if __name__ == "__main__":
    show(cases())
