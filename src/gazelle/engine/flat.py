"""Trained parameters in one buffer, and their gradients in another: the optimizer's step is one kernel, and so are
clipping and clearing. The parameters stay what they are; only their memory moves.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatParameters:
    """A group of parameters of one type on one device, laid end to end.

    Args:
        parameters: what is trained. Their values and gradients become views of `self.values` and `self.grad`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        size = sum(_padded(parameter.numel()) for parameter in self.parameters)
        self.values = nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        self.grad = self.values.grad = torch.zeros_like(self.values)
        self.attach()

    def attach(self) -> None:
        """Make parameters views of the buffers, with the values that they have now, and clear the gradients."""
        at = 0
        with torch.no_grad():
            self.grad.zero_()
            for parameter in self.parameters:
                span = slice(at, at + parameter.numel())
                home = self.values.data[span].view(parameter.shape)
                if parameter.data_ptr() != home.data_ptr():
                    home.copy_(parameter)
                    parameter.data = home
                parameter.grad = self.grad[span].view(parameter.shape)
                at += _padded(parameter.numel())


def _padded(size: int) -> int:
    """Sizes are rounded up so that each parameter begins on a 256-element boundary: the blocks of 8-bit optimizers."""
    return -(-size // 256) * 256


def clip_(flats: Iterable[FlatParameters], max_norm: float) -> Tensor:
    """Scale gradients so that their norm is at most `max_norm`; returns the norm before."""
    grads = [flat.grad for flat in flats]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does it
    factor = torch.where(norm.isfinite(), factor, 1.0)  # so that one can still see which of them are not
    for grad in grads:
        grad.mul_(factor)
    return norm
