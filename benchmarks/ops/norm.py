"""RMS norm: forward, the gradient of its input with and without a residual, and its weight's, in rows and in heads.

GB/s count what has to be read and written. The weight is frozen; Liger computes its gradient all the same.
Alone: python -m benchmarks.ops.norm
"""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.ops._timing import ON_GPU, case, forward_and_backward, peers, random, show
from torch import Tensor
from torch.nn import functional

from gazelle.kernels.norm import rms_norm, rms_norm_backward, rms_norm_weight_grad

EPS = 1e-5
SHAPES = ((8192, 4096), (8192, 576), (8192, 40, 128)) if ON_GPU else ((512, 576), (512, 12, 64))


def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """As in transformers' Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, EPS)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    others = peers(hugging_face, "liger_rms_norm", eps=EPS, in_place=False) | {"torch's own": torch_norm}
    for shape in SHAPES:
        name, x, dy, weight = "x".join(map(str, shape)), random(*shape), random(*shape), random(shape[-1])
        size, rstd, stream = x.nbytes, rms_norm(x, weight, EPS)[1], random(*shape)
        yield case("norm", f"{name} forward, gazelle", 2 * size, rms_norm, x, weight, EPS)
        yield case("norm", f"{name} backward, gazelle", 3 * size, rms_norm_backward, dy, x, weight, rstd)
        yield case("norm", f"{name} backward onto a residual, gazelle", 4 * size, rms_norm_backward, dy, x, weight,
                   rstd, residual=stream, out=stream)
        yield case("norm", f"{name} weight's gradient, gazelle", 2 * size, rms_norm_weight_grad, dy, x, rstd)
        yield from forward_and_backward("norm", name, others, (x.requires_grad_(), weight), (dy,), (2 * size, 3 * size))


if __name__ == "__main__":
    show(cases())
