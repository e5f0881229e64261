"""The loss head: logits are made in chunks, turned into their own gradient in place, multiplied back, and never kept.

Shapes: n labelled positions, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gazelle.kernels.cross_entropy import cross_entropy_
from gazelle.kernels.matmul import times

CHUNK_BYTES = 256 * 2**20  # of logits that exist at a time


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0,
                         softcap: float | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross entropies, in nats (float32, or float64 for such inputs).

    Args:
        hidden: [n, H], what the head reads.
        weight: [V, H], the head's.
        targets: [n] ids; -100 for a position that is not learnt.
        scale: what logits are multiplied by.
        softcap: scaled logits become softcap · tanh(logit / softcap).
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """
    if not torch.is_grad_enabled():  # inside, a weight that is trained would still want its gradient [V, H]
        weight = weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, softcap, label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                scale: float, softcap: float | None, label_smoothing: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.detach().to(hidden.dtype)
            rows = max(1, CHUNK_BYTES // (len(head) * hidden.element_size()))
            for at in range(0, len(hidden), rows):
                part = hidden[at : at + rows]
                logits = times(part, head)
                total += cross_entropy_(logits, targets[at : at + rows], scale, softcap, label_smoothing).sum()
                if d_hidden is not None:
                    times(logits, head.t(), out=d_hidden[at : at + rows])
                if d_weight is not None:
                    d_weight += logits.t() @ part
                del logits  # before the next chunk is made
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None
