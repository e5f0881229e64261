"""What adapters add to a product that was made without them.

Shapes: T tokens, N outputs, R adapter columns.
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton


def add_low_rank(y: Tensor, z: Tensor, b: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y + zbᵀ + residual [T, N], summed in float32 and rounded once.

    Args:
        y: [T, N]. z: [T, R]. b: [N, R]. Of all of them rows may lie apart.
        residual: [T, N].
        out: [T, N] to write to; may be `y`. Without it, the sum is written to `y`.
    """
    out = y if out is None else out
    if use_triton(y):
        from gazelle.kernels import low_rank_triton

        return low_rank_triton.add_low_rank(y, z, b, residual, out)
    wide = torch.promote_types(y.dtype, torch.float32)
    total = torch.addmm(y.to(wide), z.to(wide), b.to(wide).t())
    return out.copy_(total if residual is None else total.add_(residual))
