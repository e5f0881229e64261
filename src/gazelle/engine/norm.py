"""The norm after the last layer, as one node of autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gazelle.engine.layer import Shared
from gazelle.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad


def final_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, shared: Shared | None = None) -> Tensor:
    """x [T, H] divided by its root mean square and multiplied by weight [H] + offset.

    With what the layers share, the gradient of x is made where they change it in place.
    """
    return _FinalNorm.apply(x, weight, eps, offset, shared)


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, shared: Shared | None) -> Tensor:
        out, rstd = rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.shared = offset, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            out = None if ctx.shared is None else ctx.shared.begin(*x.shape, x)[:, : x.shape[1]]
            dx = rms_norm_backward(dy, x, weight, rstd, ctx.offset, out=out)
        dw = rms_norm_weight_grad(dy, x, rstd).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None
