"""Cross entropy: the losses of logits and the gradient of their sum, both in one go.

GB/s count every logit as read once and its gradient as written once.
Alone: python -m benchmarks.ops.cross_entropy
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.ops._timing import DEVICE, ON_GPU, case, peers, random, show
from torch import Tensor
from torch.nn import functional

from gazelle.kernels.cross_entropy import cross_entropy_

SHAPES = ((1024, 128256), (2048, 49152)) if ON_GPU else ((64, 49152),)  # rows, vocabulary
OPTIONS: dict[str, dict[str, float]] = {
    "": {}, ", soft-capped": {"softcap": 30.0}, ", smoothed": {"label_smoothing": 0.1}}


def plain(logits: Tensor, targets: Tensor, softcap: float | None = None, label_smoothing: float = 0.0) -> Tensor:
    """As in transformers."""
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return functional.cross_entropy(z, targets, label_smoothing=label_smoothing, reduction="sum")


def loss_and_gradient(loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, **options: float) -> Any:
    total = loss(logits, targets, **options)
    return total, torch.autograd.grad(total, logits)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for n, V in SHAPES:
        targets = torch.randint(V, (n,), device=DEVICE)
        for suffix, options in OPTIONS.items():
            name, logits = f"{n}x{V}{suffix}", random(n, V)
            size = 2 * logits.nbytes
            for label, loss in peers(plain, "liger_cross_entropy", reduction="sum").items():
                leaf = logits.clone().requires_grad_()  # Liger's writes to it
                yield case("cross_entropy", f"{name}, {label}", size, loss_and_gradient, loss, leaf, targets, **options)
                del leaf
            yield case("cross_entropy", f"{name}, gazelle", size, cross_entropy_, logits, targets, **options)


if __name__ == "__main__":
    show(cases())
