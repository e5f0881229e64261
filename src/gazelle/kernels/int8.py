"""Eight-bit weights in bitsandbytes' layout, with a scale a row (https://arxiv.org/abs/2208.07339).

Shapes: N outputs, K inputs.
"""

from torch import Tensor

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.fp8 import to_fp8

STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes writes it
_CHUNK = 2**20  # weights that the reference holds in float32 at a time


def dequantize(weight: Tensor, row_absmax: Tensor, out: Tensor, row_scales: Tensor | None = None) -> Tensor:
    """weight · row_absmax · (1/127) in float32, rounded once more to the type of `out`: bit-equal to bitsandbytes.

    Args:
        weight: [N, K] int8, contiguous.
        row_absmax: [N] float32.
        out: [N, K] to write to; rows may lie apart. With `row_scales`, e4m3.
        row_scales: [N] float32 that rows are divided by.
    """
    if use_triton(weight):
        from gazelle.kernels import int8_triton

        return int8_triton.dequantize(weight, row_absmax, out, row_scales, transposed=False)
    step = max(1, _CHUNK // weight.shape[1])
    for row in range(0, len(weight), step):
        span = slice(row, row + step)
        values = (weight[span] * row_absmax[span, None]).mul_(STEP)
        out[span] = values if row_scales is None else to_fp8(values * row_scales[span].reciprocal()[:, None])
    return out


def dequantize_transposed(weight: Tensor, row_absmax: Tensor, out: Tensor, row_scales: Tensor) -> Tensor:
    """The same in e4m3, written as [K, N]."""
    if use_triton(weight):
        from gazelle.kernels import int8_triton

        return int8_triton.dequantize(weight, row_absmax, out, row_scales, transposed=True)
    dequantize(weight, row_absmax, out.t(), row_scales)
    return out
