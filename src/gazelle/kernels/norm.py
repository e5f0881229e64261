"""Root-mean-square norm (https://arxiv.org/abs/1910.07467), forward and backward.

Shapes: T tokens, H width of a row; a norm of heads takes [T, h, D]. Rows may lie apart (any stride but the last).
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0,
             out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x · rstd · (weight + offset), and rstd = 1 / √(mean(x²) + eps) in float32.

    Args:
        x: [T, H] or [T, h, D].
        weight: [H] or [D].
        eps: added to the mean square.
        offset: added to the weight: 1 for the Gemma families.
        out: a view of x's shape to write to.
    """
    if use_triton(x):
        from gazelle.kernels import norm_triton

        return norm_triton.rms_norm(x, weight, eps, offset, out)
    wide = _wide(x)
    rstd = (wide * wide).mean(-1).add_(eps).rsqrt_()
    scale = weight.to(wide.dtype) + offset if offset else weight.to(wide.dtype)
    if out is not None and out.dtype == wide.dtype:
        torch.mul(wide, rstd[..., None], out=out)
        return out.mul_(scale), rstd
    y = (wide * rstd[..., None]).mul_(scale)
    return (y.to(x.dtype) if out is None else out.copy_(y)), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0,
                      residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The gradient of x, plus `residual`.

    Args:
        dy: like x.
        x, weight, offset: as in the forward pass.
        rstd: from it.
        residual: like x; what is added to the gradient.
        out: where to write; may be `residual` itself.
    """
    if use_triton(x):
        from gazelle.kernels import norm_triton

        return norm_triton.rms_norm_backward(dy, x, weight, rstd, offset, residual, out)
    wide = _wide(x)
    scale = weight.to(wide.dtype) + offset if offset else weight.to(wide.dtype)
    d = _wide(dy) * scale
    inner = (d * wide).mean(-1, keepdim=True).mul_(rstd[..., None] ** 3)
    dx = d.mul_(rstd[..., None]).addcmul_(wide, inner, value=-1)
    if residual is not None:
        dx += residual
    return dx.to(x.dtype) if out is None else out.copy_(dx)


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the weight [H], in float32; the same sum in every run."""
    if use_triton(x):
        from gazelle.kernels import norm_triton

        return norm_triton.rms_norm_weight_grad(dy, x, rstd)
    return (_wide(dy) * _wide(x) * rstd[..., None]).flatten(0, -2).sum(0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
