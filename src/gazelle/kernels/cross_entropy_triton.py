"""`kernels.cross_entropy` in Triton: a program a row; one pass for the sum of exponentials, one for the gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _z(x, scale, cap, CAP: tl.constexpr):
    """Scaled and capped logits, and the slope of that."""
    z = x.to(tl.float32) * scale
    slope = scale
    if CAP:
        t = 2 * tl.sigmoid(2 * z / cap) - 1
        z = cap * t
        slope = scale * (1 - t * t)
    return z, slope


@triton.jit
def _loss(logits, targets, losses, V: tl.constexpr, row_stride, scale, cap, smoothing, CAP: tl.constexpr,
          BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * row_stride
    target = tl.load(targets + row)
    learnt = target != -100
    column = tl.arange(0, BLOCK)
    top = -float("inf")
    total = 0.0
    plain = 0.0
    for start in range(0, V, BLOCK):
        mask = start + column < V
        z, _ = _z(tl.load(at + start + column, mask=mask, other=0.0), scale, cap, CAP)
        plain += tl.sum(tl.where(mask, z, 0.0))
        z = tl.where(mask, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher))
        top = higher
    norm = top + tl.log(total)
    aim, _ = _z(tl.load(at + tl.maximum(target, 0)), scale, cap, CAP)
    loss = norm - (1 - smoothing) * aim
    if smoothing > 0:  # 0 · -∞ is no number
        loss -= smoothing * plain / V
    tl.store(losses + row, tl.where(learnt, loss, 0.0))
    for start in range(0, V, BLOCK):
        mask = start + column < V
        z, slope = _z(tl.load(at + start + column, mask=mask, other=0.0), scale, cap, CAP)
        g = tl.exp(z - norm) - smoothing / V
        g = tl.where(start + column == target, g - (1 - smoothing), g) * slope
        tl.store(at + start + column, tl.where(learnt, g, 0.0).to(logits.dtype.element_ty), mask=mask)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float = 1.0, softcap: float | None = None,
                   label_smoothing: float = 0.0) -> Tensor:
    """See `kernels.cross_entropy.cross_entropy_`."""
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        block = min(_BLOCK, triton.next_power_of_2(V))
        _loss[(n,)](logits, targets, losses, V, logits.stride(0), scale, softcap or 1.0, label_smoothing,
                    CAP=softcap is not None, BLOCK=block, num_warps=16 if block >= 8192 else 4)
    return losses
