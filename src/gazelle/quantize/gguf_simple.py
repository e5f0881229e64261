"""GGUF's plain blocks: 32 weights that share a scale, or scale and minimum. Byte for byte as llama.cpp makes them.

Layouts: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h. With importance, llama.cpp searches for scales,
and so do we: then bytes may differ, errors hardly. Shapes: B blocks of 32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.quantize.gguf_bits import half_bytes, halves, join, small, split
from gazelle.quantize.gguf_search import STEPS, affine, symmetric

BLOCK = 32
_BELOW_HALF = 0.49999997  # of float32: what is cut off after this has been added is rounded, halves away from 0


@dataclass(frozen=True)
class Simple:
    """q4_0 and q5_0, with `minimum` q4_1 and q5_1."""

    bits: int
    minimum: bool

    def encode(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """[B, 32] -> [B, bytes]: scale, minimum, fifth bits [4], other bits [16]."""
        top = (1 << self.bits) - 1
        middle = 0 if self.minimum else (top + 1) // 2
        scale, low = self._scale(x, top, middle) if weights is None else self._searched(x, weights, top, middle)
        inverse, normal = _inverse(scale)
        q = (x if low is None else x - low) * inverse
        q += torch.where(normal, middle + 0.5, 0)
        q = small(q.clamp_(0, top))
        parts = [half_bytes(scale)] if low is None else [half_bytes(scale), half_bytes(low)]
        if self.bits == 5:
            parts.append(join((q >> 4).view(-1, 4, 8).transpose(1, 2), 1))
        return torch.cat((*parts, join((q & 15).view(-1, 2, 16), 4)), 1)

    def _scale(self, x: Tensor, top: int, middle: int) -> tuple[Tensor, Tensor | None]:
        if middle:
            return _farthest(x) / -middle, None
        low = x.amin(1, keepdim=True)
        return _divided(x.amax(1, keepdim=True) - low, top), low

    def _searched(self, x: Tensor, weights: Tensor, top: int, middle: int) -> tuple[Tensor, Tensor | None]:
        if middle:
            return symmetric(x, weights, -middle, middle - 1, STEPS)[0].half().float()[:, None], None
        found = affine(x, weights, top, STEPS)
        return found.scale.half().float()[:, None], found.offset.half().float()[:, None]

    def decode(self, data: Tensor) -> Tensor:
        """[B, bytes] -> [B, 32]."""
        q = split(data[:, -16:], 2, 4).flatten(1)
        if self.bits == 5:
            q += split(data[:, -20:-16], 8, 1).transpose(1, 2).flatten(1) << 4
        if self.minimum:
            return q.float().mul_(halves(data[:, :2])).add_(halves(data[:, 2:4]))
        return q.float().sub_(1 << self.bits - 1).mul_(halves(data[:, :2]))


def encode_q8(x: Tensor, _: Tensor | None) -> Tensor:
    """[B, 32] -> [B, 34]: scale, q [32]."""
    scale = _divided(x.abs().amax(1, keepdim=True), 127)
    q = x * _inverse(scale)[0]
    q += torch.copysign(torch.tensor(_BELOW_HALF, device=x.device), x)
    return torch.cat((half_bytes(scale), q.to(torch.int8).view(torch.uint8)), 1)


def decode_q8(data: Tensor) -> Tensor:
    """[B, 34] -> [B, 32]."""
    return data[:, 2:].view(torch.int8).float().mul_(halves(data[:, :2]))


def encode_type(dtype: torch.dtype, x: Tensor, _: Tensor | None) -> Tensor:
    """[B, 1] -> the bytes of `dtype`."""
    return half_bytes(x) if dtype == torch.float16 else x.to(dtype).view(torch.uint8)


def decode_type(dtype: torch.dtype, data: Tensor) -> Tensor:
    """Bytes of `dtype` -> [B, 1]."""
    return data.contiguous().view(dtype).float()


def _divided(x: Tensor, by: int) -> Tensor:
    """x / by, rounded once: by a plain number, torch multiplies with 1 / by on a GPU."""
    return x / x.new_tensor(by)


def _inverse(scale: Tensor) -> tuple[Tensor, Tensor]:
    """1 / scale, and 0 for 0 and for scales too small to have one, which are not `normal`: llama.cpp makes all q 0."""
    inverse = torch.where(scale != 0, scale, torch.inf).reciprocal_()
    normal = inverse.isfinite()
    return inverse.masked_fill_(~normal, 0), normal


def _farthest(x: Tensor) -> Tensor:
    """The number of every block that lies farthest from 0, the first of several: [B, 32] -> [B, 1]."""
    top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    found = torch.where(top > -bottom, top, bottom)
    ties = (top == -bottom).squeeze(1).nonzero().squeeze(1)
    if len(ties):
        rows = x[ties]
        found[ties] = rows.gather(1, rows.abs().argmax(1, keepdim=True)) + 0.0  # and no -0
    return found
