"""AWQ: large inputs are scaled up before rounding, and down where they come from (https://arxiv.org/abs/2306.00978).

Shapes: N outputs, K inputs.
"""

import torch
from torch import Tensor

from gazelle.quantize.groups import Grid, fit, rounded

_POWERS = 10


def input_scales(weight: Tensor, gram: Tensor, magnitude: Tensor, grid: Grid) -> Tensor:
    """What each input of a weight is to be scaled by: magnitude^p with the p whose outputs change least.

    The change is ||(Q(W s) / s - W) X||², which the Gram matrix gives without the inputs themselves.

    Args:
        weight: [N, K], of all linears that share the input one below the other.
        gram: [K, K], the sum of x xᵀ over the inputs, in any scale.
        magnitude: [K] mean of the absolute inputs, equal for inputs that must be scaled alike.
        grid: what the numbers are rounded to.

    Returns:
        [K], all ones where no scale does better.
    """
    best = torch.ones_like(magnitude)
    least = output_error(rounded(weight, fit(weight, grid), grid) - weight, gram)
    level = magnitude.clamp(min=magnitude.max() * 1e-4 + torch.finfo(magnitude.dtype).tiny)
    for number in range(1, _POWERS + 1):
        scales = level ** (number / _POWERS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = weight * scales
        error = output_error(rounded(scaled, fit(scaled, grid), grid) / scales - weight, gram)
        if error < least:
            best, least = scales, error
    return best


def output_error(difference: Tensor, gram: Tensor) -> float:
    """||D X||² of a difference of weights D [N, K] and inputs X with X Xᵀ = `gram`."""
    return float(((difference @ gram) * difference).sum())
