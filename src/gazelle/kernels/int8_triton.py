"""`kernels.int8` in Triton, bound by memory: 3 bytes a weight."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.fp8_triton import divided_by

_TILE: dict[bool, dict[str, Any]] = {
    False: {"ROWS": 4, "COLUMNS": 1024, "num_warps": 4}, True: {"ROWS": 128, "COLUMNS": 64, "num_warps": 8},
}


@triton.jit(do_not_specialize=["stride"])
def _dequantize(weight, row_absmax, row_scales, out, N, K, stride, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
                UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.cdiv(K, COLUMNS)
    n = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    mask = (n < N)[:, None] & (k < K)[None, :]
    wide = n[:, None].to(tl.int64)
    # 8 weights a thread, as many as it stores: otherwise they change threads in between.
    place = tl.max_contiguous(weight + wide * K + k[None, :], [1, 8])
    absmax = tl.load(row_absmax + n, mask=n < N, other=0.0)
    value = tl.load(place, mask=mask, other=0).to(tl.float32) * absmax[:, None] * 7.874015718698502e-3
    if SCALED:
        value = value * divided_by(tl.load(row_scales + n, mask=n < N, other=1.0))[:, None]
    value = value.to(out.dtype.element_ty)
    pitch = stride * UNIT
    if TRANSPOSED:
        target = out + k[:, None].to(tl.int64) * pitch + n[None, :]
        tl.store(target, tl.trans(value), mask=(k < K)[:, None] & (n < N)[None, :])
    else:
        tl.store(tl.max_contiguous(out + wide * pitch + k[None, :], [1, 8]), value, mask=mask)


def dequantize(weight: Tensor, row_absmax: Tensor, out: Tensor, row_scales: Tensor | None, *,
               transposed: bool) -> Tensor:
    """See `kernels.int8`."""
    N, K = weight.shape
    stride = out.stride(0)
    unit = next(unit for unit in (16, 8, 1) if stride % unit == 0)  # tells the compiler how stores are aligned
    tile = _TILE[transposed]
    _dequantize[(triton.cdiv(N, tile["ROWS"]) * triton.cdiv(K, tile["COLUMNS"]),)](
        weight, row_absmax, row_absmax if row_scales is None else row_scales, out, N, K, stride // unit,
        SCALED=row_scales is not None, TRANSPOSED=transposed, UNIT=unit, enable_fp_fusion=False, **tile)
    return out
