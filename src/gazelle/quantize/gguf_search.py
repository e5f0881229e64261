"""Scales that fit best: a search over candidates, each judged by least squares in closed form.

All searches minimise Σ w·(x − x̂)² in every group of numbers for itself. A candidate divides the range of a group by a
little more or less than the levels there are, which moves where numbers are rounded to; for the levels found, the best
scale (and offset) and the error that is left follow from a few sums. This is the idea of make_qkx3_quants in llama.cpp
(https://github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c), laid out so that a candidate is tried on all groups at
once. Shapes: B groups, L numbers in one, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = tuple(step / 4 for step in range(-4, 5))  # that candidates are apart; more of them gain tenths of a percent
_TINY = 1e-30  # what lies below has no scale in 16 bits, and its reciprocal overflows


@dataclass(frozen=True, eq=False)
class Affine:
    """x ≈ scale·q + offset, 0 ≤ q ≤ levels, offset ≤ 0, and what the error depends on besides: all [B]."""

    scale: Tensor
    offset: Tensor
    w: Tensor  # Σ w
    wq: Tensor  # Σ w·q
    wqq: Tensor  # Σ w·q²

    @property
    def stiffness(self) -> Tensor:
        """What the square of a change of the scale costs if the offset makes up for it, as far as it has digits."""
        left = torch.addcdiv(self.wqq, self.wq.square(), self.w.clamp(min=_TINY), value=-1)
        return torch.maximum(left, self.wqq / 1024)

    def offset_for(self, scale: Tensor) -> Tensor:
        """The best offset if the scale is to be another one."""
        change = (self.scale - scale).mul_(self.wq).div_(self.w.clamp(min=_TINY))
        return change.add_(self.offset).clamp_(max=0)


def affine(x: Tensor, w: Tensor, levels: int, steps: Sequence[float]) -> Affine:
    """Scale and offset of every group.

    Args:
        x: [B, L] float32.
        w: [B, L] float32, not negative.
        levels: the highest q.
        steps: candidates divide the range by levels + step; 0 should be among them, as it keeps both ends.
    """
    low = x.amin(1, keepdim=True).clamp_(max=0)
    y = x - low  # numbers from 0 on, so that an offset far from 0 costs the sums no digits
    span = y.amax(1, keepdim=True)
    inverses = span.clamp(min=_TINY).reciprocal_() * x.new_tensor(steps).add_(levels)[:, None, None]
    wy = w * y
    sum_wy, sum_w = wy.sum(1), w.sum(1)
    sums, q, product = x.new_empty(len(steps), 3, len(x)), torch.empty_like(x), torch.empty_like(x)
    for step, inverse, out in zip(steps, inverses.unbind(), sums.unbind(), strict=True):
        torch.mul(y, inverse, out=q).round_()
        if step >= 0.5:
            q.clamp_(max=levels)
        torch.sum(torch.mul(q, wy, out=product), 1, out=out[0])
        torch.sum(torch.mul(q, w, out=product), 1, out=out[1])
        torch.sum(product.mul_(q), 1, out=out[2])
    wqy, wq, wqq = sums.unbind(1)  # [C, B] each

    # The offset from `low` by least squares, but none that is above 0 then; and the best scale for that offset.
    highest = -low.squeeze(1)
    product = sum_w * wqq
    determinant = torch.addcmul(product, wq, wq, value=-1)
    determined = determinant > product.mul_(1e-5)  # else all q are alike, and what is left is rounding
    shift = torch.addcmul(wqq * sum_wy, wq, wqy, value=-1).div_(determinant.clamp_(min=_TINY))
    shift.clamp_(max=highest).masked_fill_(~determined, 0)
    scale = torch.addcmul(wqy, shift, wq, value=-1).div_(wqq.clamp(min=_TINY))
    gain = torch.addcmul(2 * sum_wy, shift, sum_w, value=-1).mul_(shift)  # of error, from that of scale 0, offset low
    gain.addcmul_(scale.square(), wqq)
    best = gain.max(0, keepdim=True).indices
    scale, shift, wq, wqq = (values.gather(0, best).squeeze(0) for values in (scale, shift, wq, wqq))
    scale = torch.where(sum_w > 0, scale, span.squeeze(1) / levels)  # without weights, as far as the ends ask for
    return Affine(scale.clamp_(min=0), shift - highest, sum_w, wq, wqq)


def symmetric(x: Tensor, w: Tensor, low: int, high: int, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """x ≈ scale·q, low ≤ q ≤ high: the scale of every group, which may be negative, and Σ w·q², both [B].

    Args:
        x: [B, L] float32.
        w: [B, L] float32, not negative.
        low: where the number farthest from 0 is put, -high - 1.
        high: the highest q.
        steps: candidates divide the number farthest from 0 by low - step.
    """
    unit = _inverse(_farthest(x, 1))
    inverses = unit[:, None] * _ends(x, low, steps)[:, None, None]
    wx, sums = w * x, x.new_empty(len(steps), 2, len(x))
    q, product = torch.empty_like(x), torch.empty_like(x)
    for inverse, out in zip(inverses.unbind(), sums.unbind(), strict=True):
        torch.mul(x, inverse, out=q).round_().clamp_(low, high)
        torch.sum(torch.mul(q, wx, out=product), 1, out=out[0])
        torch.sum(torch.mul(q, w, out=product).mul_(q), 1, out=out[1])
    wqx, wqq = sums.unbind(1)  # [C, B] each
    scale = wqx / wqq.clamp(min=_TINY)
    best = (scale * wqx).max(0, keepdim=True).indices
    scale, wqq = scale.gather(0, best).squeeze(0), wqq.gather(0, best).squeeze(0)
    return torch.where(wqq > 0, scale, _inverse(unit * low)), wqq


def shared(values: Tensor, w: Tensor, low: int, high: int, steps: Sequence[float]) -> Tensor:
    """`symmetric` for few numbers, all candidates together: values and w [B, G] -> scale [B], which float16 holds.

    With `low` 0, values are not negative, and the highest is put at high + step.
    """
    values, w = values.t().contiguous(), w.t().contiguous()
    unit = _inverse(_farthest(values, 0))
    q = values * (unit * _ends(values, low or high, steps)[:, None])[:, None]
    q.round_().clamp_(low, high)
    wq = q * w
    scale = (wq * values).sum(1).div_(wq.mul_(q).sum(1).clamp_(min=_TINY)).half().float()
    errors = torch.addcmul(values, q, scale[:, None], value=-1).square_().mul_(w).sum(1)  # those of float16 as well
    scale = scale.gather(0, errors.min(0, keepdim=True).indices).squeeze(0)
    return torch.where(w.sum(0) > 0, scale, _inverse(unit * (low or high)).half().float())


def _farthest(x: Tensor, dim: int) -> Tensor:
    """The number of every group that lies farthest from 0."""
    top, bottom = x.amax(dim), x.amin(dim)
    return torch.where(top > -bottom, top, bottom)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for what is next to nothing."""
    return torch.where(x.abs() > _TINY, x, torch.inf).reciprocal_()


def _ends(like: Tensor, end: int, steps: Sequence[float]) -> Tensor:
    """[C] where candidates put the number farthest from 0."""
    return like.new_tensor([end + step if end > 0 else end - step for step in steps])
