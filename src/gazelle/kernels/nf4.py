"""Four-bit weights in bitsandbytes' layout, written back as numbers (https://arxiv.org/abs/2305.14314).

Two weights lie in a byte, the first in its high half. Every `block` weights, counted through the flattened matrix,
share a scale: a row may begin in the middle of a block. Shapes: N outputs, K inputs, B = ⌈N·K/block⌉ blocks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.fp8 import to_fp8

_CHUNK = 2**20  # weights that the reference holds in float32 at a time


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales that are quantised themselves: scale = code[index] · absmax[block of scales] + offset, rounded twice."""

    code: Tensor  # [256] float32
    absmax: Tensor  # [⌈B/block⌉] float32
    offset: Tensor  # [] float32
    block: int


def dequantize(packed: Tensor, code: Tensor, absmax: Tensor, nested: Nested | None, block: int, out: Tensor,
               row_scales: Tensor | None = None) -> Tensor:
    """code[index] · scale in float32, rounded once to the type of `out`: bit-equal to bitsandbytes.

    Args:
        packed: [⌈N·K/2⌉] uint8, contiguous.
        code: [16] float32, the values of an index.
        absmax: [B] the scales, float32; with `nested`, uint8.
        nested: how the scales themselves are quantised.
        block: weights that share a scale, a power of two from 32 on.
        out: [N, K] to write to; rows may lie apart. With `row_scales`, e4m3.
        row_scales: [N] float32 that rows are divided by.
    """
    if use_triton(packed):
        from gazelle.kernels import nf4_triton

        return nf4_triton.dequantize(packed, code, absmax, nested, block, out, row_scales, transposed=False)
    N, K = out.shape
    whole = block // math.gcd(K, block)  # so many rows are whole blocks
    step = -(-max(1, _CHUNK // K) // whole) * whole
    all_scales = scales(absmax, nested)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1).view(torch.int64)  # a byte's two weights
    data = packed.flatten().view(torch.uint8)
    for row in range(0, N, step):
        end = min(row + step, N)
        indices = data[row * K // 2 : (end * K + 1) // 2].long()
        values = pairs.take(indices).view(torch.float32)[: (end - row) * K]
        values *= all_scales[row * K // block : -(-end * K // block)].repeat_interleave(block)[: len(values)]
        weight = values.view(-1, K)
        out[row:end] = weight if row_scales is None else to_fp8(weight * row_scales[row:end].reciprocal()[:, None])
    return out


def dequantize_transposed(packed: Tensor, code: Tensor, absmax: Tensor, nested: Nested | None, block: int, out: Tensor,
                          row_scales: Tensor) -> Tensor:
    """The same in e4m3, written as [K, N]."""
    if use_triton(packed):
        from gazelle.kernels import nf4_triton

        return nf4_triton.dequantize(packed, code, absmax, nested, block, out, row_scales, transposed=True)
    dequantize(packed, code, absmax, nested, block, out.t(), row_scales)
    return out


def scales(absmax: Tensor, nested: Nested | None) -> Tensor:
    """The scales of all blocks [B] in float32."""
    if nested is None:
        return absmax.float()
    quantised = absmax.flatten()
    values = nested.code.index_select(0, quantised.int())
    return values.mul_(nested.absmax.repeat_interleave(nested.block)[: len(values)]).add_(nested.offset)


def row_amax(absmax: Tensor, nested: Nested | None, block: int, shape: tuple[int, int]) -> Tensor:
    """What no weight of a row exceeds [N]: its largest scale, since the codes of bitsandbytes end at ±1.

    It is reached, unless the largest weight of a block that two rows share lies in the other.
    """
    N, K = shape
    size = scales(absmax, nested).abs()  # a nested scale near 0 can come out below it
    if K % block == 0:
        return size.view(N, -1).amax(1)
    first = torch.arange(N, device=size.device) * K // block
    last = (torch.arange(1, N + 1, device=size.device) * K - 1) // block
    span = torch.arange(-(-K // block) + 1, device=size.device)
    return size[torch.minimum(first[:, None] + span, last[:, None])].amax(1)
