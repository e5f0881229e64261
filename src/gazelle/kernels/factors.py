"""Gradients of the LoRA factors of one projection, cut out of two matrices and added to where they are gathered.

Shapes: N outputs and K inputs of all parts, R adapter columns; n and r of one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gazelle.kernels.dispatch import use_triton

MOST_PARTS = 3  # of a projection: queries, keys and values


@dataclass(frozen=True)
class Factors:
    """One adapter: the gradients of its `a` [r, K] and `b` [n, r], its scale, its rows of N and columns of R."""

    a: Tensor
    b: Tensor
    scale: float
    rows: slice
    columns: slice


def add_factor_gradients(dA: Tensor, dB: Tensor, parts: Sequence[Factors]) -> None:
    """Add dA[columns] to each part's `a`, and scale · dB[rows, columns] to its `b`.

    Args:
        dA: [R, K]. dB: [N, R]; both contiguous.
        parts: at most `MOST_PARTS`, their tensors contiguous and of one type.
    """
    if use_triton(dA):
        from gazelle.kernels import factors_triton

        factors_triton.add_factor_gradients(dA, dB, parts)
        return
    for part in parts:
        part.a.add_(dA[part.columns])
        part.b.add_(dB[part.rows, part.columns], alpha=part.scale)
