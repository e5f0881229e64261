"""Cross entropy of logits, which are turned into their own gradient in place.

Shapes: n rows, V vocabulary.
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton

IGNORED = -100


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float = 1.0, softcap: float | None = None,
                   label_smoothing: float = 0.0) -> Tensor:
    """The loss [n] of each row (float32, or float64 for such logits); `logits` hold the gradient of their sum after.

    With z = scale · logits, or softcap · tanh(scale · logits / softcap), a loss is that of
    `torch.nn.functional.cross_entropy(z, targets, label_smoothing=…)`.

    Args:
        logits: [n, V].
        targets: [n] int64; -100 makes loss and gradient zero.
        scale, softcap, label_smoothing: as above.
    """
    if use_triton(logits):
        from gazelle.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_(logits, targets, scale, softcap, label_smoothing)
    wide = torch.promote_types(logits.dtype, torch.float32)
    learnt = (targets != IGNORED).to(wide)
    safe = targets.clamp(min=0)[:, None]
    # In place wherever the type allows: on a CPU, new memory for a row of logits costs more than its arithmetic.
    z = logits.to(wide).mul_(scale) if scale != 1 else logits.to(wide)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z
        z.mul_(softcap)
    at_target = z.gather(1, safe)[:, 0]
    top = z.amax(1)
    mean = z.mean(1) if label_smoothing else None
    p = z.sub_(top[:, None]).exp_()
    total = p.sum(1)
    norm = top + total.log()
    losses = norm - (1 - label_smoothing) * at_target
    if mean is not None:
        losses -= label_smoothing * mean
    p.mul_((learnt * scale / total)[:, None])
    if label_smoothing:
        p -= (learnt * (scale * label_smoothing / logits.shape[1]))[:, None]
    p.scatter_add_(1, safe, (learnt * (scale * (label_smoothing - 1)))[:, None])
    if slope is not None:
        p.mul_(slope)
    if p.data_ptr() != logits.data_ptr():
        logits.copy_(p)
    return losses.masked_fill_(targets == IGNORED, 0)
