"""GPTQ: columns are rounded one by one, and the later ones make up for the errors (https://arxiv.org/abs/2210.17323).

Shapes: N outputs, K inputs.
"""

import torch
from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.quantize.groups import Grid, Steps, fit, nearest

_BLOCK = 32  # columns after which the rest of the matrix hears of the errors
_DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it
_TRIES = 4


def gptq(weight: Tensor, gram: Tensor, grid: Grid, *, act_order: bool = True) -> tuple[Tensor, Steps]:
    """A weight rounded so that its outputs on the inputs it was calibrated with change little.

    Args:
        weight: [N, K]. Its type is what is computed in.
        gram: [K, K], the sum of x xᵀ over the inputs, in any scale.
        grid: what the numbers are rounded to. A group has a multiple of 32 inputs.
        act_order: round the columns with the largest inputs first. Groups stay where they are.

    Returns:
        The numbers [N, K] as they are read back, and their steps.

    Raises:
        ModelError: the inputs are not numbers.
    """
    N, K = weight.shape
    hessian = gram.to(weight.dtype, copy=True)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = diagonal.mean() + (diagonal.sum() == 0)  # never fed: rounded to the nearest
    importance = diagonal.clone()
    order = torch.arange(K, device=weight.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order])
    if act_order:  # a group is never whole before all is done, so its steps come from the weight as it was
        steps = fit(weight, grid, importance)
    else:
        steps = Steps(weight.new_empty(N, K // grid.group, dtype=grid.dtype),
                      weight.new_zeros(N, K // grid.group, dtype=torch.int8))
    groups = (order // grid.group).tolist()
    columns = weight.T[order]  # columns as rows, whose numbers lie side by side
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        errors = columns.new_empty(end - start, N)
        if not act_order and start % grid.group == 0:
            stop = start + grid.group
            begun = fit(columns[start:stop].T, grid, importance[start:stop])
            steps.step[:, groups[start]], steps.zero[:, groups[start]] = begun.step[:, 0], begun.zero[:, 0]
        step, zero = ({group: tensor[:, group].contiguous() for group in set(groups[start:end])}
                      for tensor in (steps.step, steps.zero))
        for column in range(start, end):
            group, error = groups[column], errors[column - start]
            number = nearest(columns[column], step[group], zero[group])
            torch.sub(columns[column], number, out=error).div_(upper[column, column])
            columns[column] = number
            columns[column + 1:end].addr_(upper[column, column + 1:end], error, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    numbers = torch.empty_like(columns)
    numbers[order] = columns
    return numbers.T.contiguous(), steps


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = (H + damping)⁻¹; more damping where rounding made H indefinite.

    U = R⁻¹ where H = R Rᵀ with R upper triangular: the Cholesky factor of H with rows and columns in reverse.
    """
    damp = _DAMP * hessian.diagonal().mean()
    for _ in range(_TRIES):
        hessian.diagonal().add_(damp)
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed and factor.isfinite().all():
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
        damp = damp * 10
    raise ModelError("the inputs of a layer cannot be calibrated with", where="gptq", found="values that are not "
                     "numbers, or far too large", expected="finite inputs",
                     fix="check the calibration data, or export without quantisation and look at the answers")
