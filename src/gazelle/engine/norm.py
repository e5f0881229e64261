"""The norm after the last layer, as one node of autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gazelle.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad


def final_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [T, H] divided by its root mean square and multiplied by weight [H] + offset."""
    return _FinalNorm.apply(x, weight, eps, offset)


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float,
                offset: float) -> Tensor:
        out, rstd = rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = rms_norm_backward(dy, x, weight, rstd, ctx.offset) if ctx.needs_input_grad[0] else None
        dw = rms_norm_weight_grad(dy, x, rstd).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None
