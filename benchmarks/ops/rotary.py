"""Rotary positions of queries and keys: in place in what they were split from, and back again in the backward pass.

GB/s count what has to be read and written. The backward pass of gazelle also lays the gradients of queries, keys and
values side by side; "eager, side by side" does that too.
Alone: python -m benchmarks.ops.rotary
"""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.ops._timing import DEVICE, DTYPE, ON_GPU, case, forward_and_backward, peers, random, show
from torch import Tensor

from gazelle.kernels.rotary import rotate_, rotate_into

# (tokens, heads, key-value heads, head size)
SHAPES = ((8192, 32, 8, 128), (8192, 9, 3, 64)) if ON_GPU else ((512, 9, 3, 64),)


def swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def hugging_face(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As in transformers: q [1, h, T, D], k [1, g, T, D], cos and sin [1, T, D]."""
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + swapped(q) * sin, k * cos + swapped(k) * sin


def side_by_side(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """`rotate_into` in plain PyTorch."""
    cos, sin = cos[:, None], sin[:, None]
    turned = [x * cos - swapped(x) * sin for x in (q, k)]
    return torch.cat([x.flatten(1) for x in (*turned, v)], 1, out=out)


def angles(T: int, D: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(T, device=DEVICE)[:, None] / 10000 ** (torch.arange(0, D, 2, device=DEVICE) / D)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    others = peers(hugging_face, "liger_rope")
    for T, h, g, D in SHAPES:
        name, (cos, sin) = f"{T}x{h}+{g}x{D}", angles(T, D)
        qkv = random(T, (h + 2 * g) * D)
        q, k, v = (random(T, n, D) for n in (h, g, g))
        turning, whole = qkv.unflatten(1, (-1, D))[:, : h + g], 2 * qkv.nbytes
        size = 2 * (q.nbytes + k.nbytes)
        yield case("rotary", f"{name} forward, gazelle", size, rotate_, turning, cos, sin)
        yield case("rotary", f"{name} backward, gazelle", size, rotate_, turning, cos, sin, inverse=True)
        yield case("rotary", f"{name} backward side by side, gazelle", whole, rotate_into, q, k, v, cos, sin, qkv)
        yield case("rotary", f"{name} backward side by side, eager", whole, side_by_side, q, k, v, cos, sin, qkv)
        inputs = [x.transpose(0, 1)[None].requires_grad_() for x in (q, k)]
        grads = [torch.randn_like(x) for x in inputs]
        yield from forward_and_backward("rotary", name, others, (*inputs, cos[None], sin[None]), grads, (size, size))


if __name__ == "__main__":
    show(cases())
