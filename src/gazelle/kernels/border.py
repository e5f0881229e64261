"""LoRA factors written into the border of a weight matrix, W̃ = [[W, sB], [A, 0]].

Shapes: N outputs and K inputs of all weights in the matrix, R adapter columns; n, r of one weight and its adapter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.factors import Factors


def fill_borders(a: Tensor, b: Tensor, parts: Sequence[Factors]) -> None:
    """Write all adapters side by side, zeros beside them included. Rows of weights without an adapter stay as they are.

    Args:
        a: [R, K], for the parts' `a`. b: [N, R], for their `b` times its scale. Rows of either may lie apart.
        parts: at least one, their columns in order and without gaps.
    """
    if use_triton(a):
        from gazelle.kernels import border_triton

        border_triton.fill_borders(a, b, parts)
        return
    for part in parts:
        columns = part.columns
        a[columns].copy_(part.a)
        strip = b[part.rows]
        strip[:, : columns.start].zero_()
        strip[:, columns.stop :].zero_()
        if part.b.dtype == b.dtype:
            torch.mul(part.b, part.scale, out=strip[:, columns])
        else:
            strip[:, columns].copy_(part.b.to(torch.promote_types(part.b.dtype, b.dtype)) * part.scale)
    a[parts[-1].columns.stop :].zero_()
