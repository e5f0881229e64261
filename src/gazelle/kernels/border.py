"""LoRA factors written into the border of a weight matrix.

Shapes: N outputs and K inputs of all weights in the matrix, R adapter columns; n, r of one weight and its adapter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.factors import Factors


def fill_borders(matrix: Tensor, parts: Sequence[Factors], inputs: int, border: int) -> None:
    """Write the adapters' part of W̃ = [[W, sB], [A, 0]], zeros beside it included.

    Args:
        matrix: W̃ [N + R, K + R].
        parts: at least one, their columns in order and without gaps.
        inputs: K.
        border: R.
    """
    if use_triton(matrix):
        from gazelle.kernels import border_triton

        border_triton.fill_borders(matrix, parts, inputs, border)
        return
    outputs = matrix.shape[0] - border
    for part in parts:
        columns = part.columns
        matrix[outputs + columns.start : outputs + columns.stop, :inputs].copy_(part.a)
        strip = matrix[part.rows, inputs:]
        strip[:, : columns.start].zero_()
        strip[:, columns.stop :].zero_()
        if part.b.dtype == matrix.dtype:
            torch.mul(part.b, part.scale, out=strip[:, columns])
        else:
            strip[:, columns].copy_(part.b.to(torch.promote_types(part.b.dtype, matrix.dtype)) * part.scale)
    matrix[outputs + parts[-1].columns.stop :, :inputs].zero_()


def clear_border(matrix: Tensor, rows: slice, inputs: int) -> None:
    """The same for a weight without an adapter."""
    matrix[rows, inputs:].zero_()
