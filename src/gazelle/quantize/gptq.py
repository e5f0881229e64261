"""GPTQ: columns are rounded one by one, and the later ones make up for the errors (https://arxiv.org/abs/2210.17323).

Shapes: N outputs, K inputs.
"""

import torch
from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.quantize.groups import Grid, Steps, fit, rounded_column

_BLOCK = 128  # columns after which the rest of the matrix hears of the errors
_DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it
_TRIES = 4


def gptq(weight: Tensor, gram: Tensor, grid: Grid, *, act_order: bool = True) -> tuple[Tensor, Steps]:
    """A weight rounded so that its outputs on the inputs it was calibrated with change little.

    Args:
        weight: [N, K]. Its type is what is computed in.
        gram: [K, K], the sum of x xᵀ over the inputs, in any scale.
        grid: what the numbers are rounded to. A group has 128 inputs or a half, a quarter, … of them.
        act_order: round the columns with the largest inputs first. Groups stay where they are.

    Returns:
        The numbers [N, K] as they are read back, and their steps.

    Raises:
        ModelError: the inputs are not numbers.
    """
    weight = weight.clone()
    N, K = weight.shape
    hessian = gram.to(weight.dtype).clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = diagonal.mean() + (diagonal.sum() == 0)  # never fed: rounded to the nearest
    importance = diagonal.clone()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(K)
    order = order.to(weight.device)
    upper = _inverse_factor(hessian[order][:, order])
    # With columns out of order a group is never whole, so its steps come from the weight as it was.
    steps = fit(weight, grid, importance) if act_order else None
    found = steps or Steps(weight.new_empty(N, K // grid.group, dtype=grid.dtype),
                           weight.new_zeros(N, K // grid.group, dtype=torch.int8))
    weight = weight[:, order]
    groups = (order // grid.group).tolist()
    numbers = torch.empty_like(weight)
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        block, errors = weight[:, start:end].clone(), weight.new_empty(N, end - start)
        for column in range(start, end):
            here, group = column - start, groups[column]
            if steps is None and column % grid.group == 0:
                stop = here + grid.group
                begun = fit(block[:, here:stop], grid, importance[column: column + grid.group])
                found.step[:, group], found.zero[:, group] = begun.step[:, 0], begun.zero[:, 0]
            number = rounded_column(block[:, here], found, group)
            errors[:, here] = (block[:, here] - number) / upper[column, column]
            numbers[:, column] = number
            block[:, here + 1:] -= errors[:, here, None] * upper[None, column, column + 1:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(numbers)
    back[:, order] = numbers
    return back, found


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = (H + damping)⁻¹; more damping where rounding made H indefinite."""
    damp = _DAMP * hessian.diagonal().mean()
    for _ in range(_TRIES):
        hessian.diagonal().add_(damp)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        damp = damp * 10
    raise ModelError("the inputs of a layer cannot be calibrated with", where="gptq", found="values that are not "
                     "numbers, or far too large", expected="finite inputs",
                     fix="check the calibration data, or export without quantisation and look at the answers")
