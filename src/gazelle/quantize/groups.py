"""Four-bit integers with a step for each group of inputs: how GPTQ, AWQ and plain rounding keep a weight.

Shapes: N outputs, K inputs, G = K / group. A number is (code - zero) * step, computed in the steps' own type, which is
how compressed-tensors, and so vLLM and transformers, read it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST, _MOST = -8, 7
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_TINY = 2.0**-24  # the smallest step that float16 holds


@dataclass(frozen=True)
class Grid:
    """How numbers are rounded.

    Attributes:
        group: inputs that share a step.
        symmetric: zero is code 0, or else any code.
        dtype: of the steps, and of the numbers that are read back.
    """

    group: int
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Steps:
    """`step` [N, G] in the grid's type and `zero` [N, G] int8."""

    step: Tensor
    zero: Tensor


def fit(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Steps:
    """Steps for a weight [N, K].

    Without `importance` they reach from the least to the largest number of a group. With it, [K], ranges are shrunk by
    up to 0.6 where that lowers the sum of squared errors that `importance` weighs: how large the inputs are.
    """
    parts = weight.unflatten(1, (-1, grid.group))
    low, high = parts.amin(-1), parts.amax(-1)
    best = _steps(low, high, grid)
    if importance is None:
        return best
    weights = importance.view(-1, grid.group)
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINK:
        steps = _steps(low * shrink, high * shrink, grid)
        error = (nearest(parts, steps.step[..., None], steps.zero[..., None]) - parts).square().mul_(weights).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = Steps(torch.where(better, steps.step, best.step), torch.where(better, steps.zero, best.zero))
    return best


def rounded(weight: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """The nearest numbers that `steps` allow, [N, K] in the type of `weight`, exactly as they are read back."""
    parts = weight.unflatten(1, (-1, grid.group))
    return nearest(parts, steps.step[..., None], steps.zero[..., None]).flatten(1)


def _steps(low: Tensor, high: Tensor, grid: Grid) -> Steps:
    if grid.symmetric:
        step = torch.maximum(-low, high) / ((_MOST - _LEAST) / 2)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low) / (_MOST - _LEAST)
    step = step.clamp(min=_TINY).to(grid.dtype)
    zero = torch.zeros_like(low) if grid.symmetric else (_LEAST - low / step).round()
    return Steps(step, zero.clamp(_LEAST, _MOST).to(torch.int8))


def nearest(numbers: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """`numbers` as they are read back from the codes nearest to them, in their own type; shapes are broadcast."""
    wide = step.to(numbers.dtype)
    codes = (numbers / wide + zero).round_().clamp_(_LEAST, _MOST)
    # The difference is a small integer, so one product in a wider type rounded once is the product in the steps' type.
    return codes.sub_(zero).mul_(wide).to(step.dtype).to(numbers.dtype)
