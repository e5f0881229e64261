"""Rotary positions (https://arxiv.org/abs/2104.09864) on heads whose halves are the pairs' two parts.

Shapes: T tokens, h heads, D head size, Dr ≤ D how much of a head rotates.
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate in place: elements i and i + Dr/2 of each head by the angle of token and i.

    Args:
        x: [T, h, D].
        cos, sin: [T, Dr] as transformers makes them, both halves equal.
        inverse: by the negative angle, which is what the backward pass does.
    """
    if use_triton(x):
        from gazelle.kernels import rotary_triton

        return rotary_triton.rotate_(x, cos, sin, inverse)
    half = cos.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = cos[:, None, :half].to(wide), sin[:, None, :half].to(wide)
    first, second = x[..., :half], x[..., half : 2 * half]
    if inverse:
        s = -s
    a, b = first.to(wide), second.to(wide)
    turned = torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)
    first.copy_(turned[0])
    second.copy_(turned[1])
    return x


def rotate_into(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Gradients of rotated q and k, and of v, as the gradient of what they were split from.

    Args:
        q: [T, h, D]. k, v: [T, g, D].
        cos, sin: as in `rotate_`, which is undone.
        out: [T, (h + 2g) · D] to write to.
    """
    if use_triton(q):
        from gazelle.kernels import rotary_triton

        return rotary_triton.rotate_into(q, k, v, cos, sin, out)
    D = q.shape[-1]
    heads = out.unflatten(1, (-1, D))
    h, g = q.shape[1], k.shape[1]
    for part, at in ((q, 0), (k, h), (v, h + g)):
        heads[:, at : at + part.shape[1]].copy_(part)
    rotate_(heads[:, : h + g], cos, sin, inverse=True)
    return out
