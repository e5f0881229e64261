"""`kernels.fp8` in Triton: activations a row a program, weights a tile a program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16384  # numbers of a row that stay in registers; a longer row is read twice, the second time from cache
_PER_WARP = 1024
_TILE: dict[bool, dict[str, Any]] = {
    False: {"ROWS": 4, "COLUMNS": 1024, "num_warps": 8}, True: {"ROWS": 128, "COLUMNS": 64, "num_warps": 8},
}


@triton.jit
def to_fp8(x):
    """x saturated in e4m3; a NaN stays one."""
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def divided_by(divisor):
    """1 / divisor, rounded as on a CPU."""
    return tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)


@triton.jit
def _row_part(x, scale_columns, k, K, SCALED: tl.constexpr):
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if SCALED:
        v = v * tl.load(scale_columns + k, mask=k < K, other=0.0)
    return v


@triton.jit(do_not_specialize=["x_stride"])
def _quantize_rows(x, scale_columns, out, scale, x_stride, K: tl.constexpr, SCALED: tl.constexpr, UNIT: tl.constexpr,
                   BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * (x_stride * UNIT)
    out += row * K
    k = tl.arange(0, BLOCK)
    v = _row_part(x, scale_columns, k, K, SCALED)
    top = tl.abs(v)
    for start in range(BLOCK, K, BLOCK):
        top = tl.maximum(top, tl.abs(_row_part(x, scale_columns, start + k, K, SCALED)))
    size = tl.maximum(tl.max(top, 0), 1e-12)
    divisor = tl.div_rn(size, tl.full([], 448.0, tl.float32))
    tl.store(scale + row, divisor)
    factor = tl.div_rn(tl.full([], 1.0, tl.float32), divisor)
    if BLOCK >= K:
        tl.store(out + k, to_fp8(v * factor), mask=k < K)
    else:
        for start in range(0, K, BLOCK):
            v = _row_part(x, scale_columns, start + k, K, SCALED)
            tl.store(out + start + k, to_fp8(v * factor), mask=start + k < K)


@triton.jit
def _divide_rows(weight, row_scales, out, N, K, w_stride, o_stride, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):
    columns = tl.cdiv(K, COLUMNS)
    n = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    mask = (n < N)[:, None] & (k < K)[None, :]
    value = tl.load(weight + n[:, None].to(tl.int64) * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    value = to_fp8(value * divided_by(tl.load(row_scales + n, mask=n < N, other=1.0))[:, None])
    if TRANSPOSED:
        target = out + k[:, None].to(tl.int64) * o_stride + n[None, :]
        tl.store(target, tl.trans(value), mask=(k < K)[:, None] & (n < N)[None, :])
    else:
        tl.store(out + n[:, None].to(tl.int64) * o_stride + k[None, :], value, mask=mask)


def quantize_rows(x: Tensor, scale_columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kernels.fp8.quantize_rows`."""
    T, K = x.shape
    out = torch.empty(T, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(T, 1, dtype=torch.float32, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(K))
    stride = x.stride(0)
    unit = 8 if stride % 8 == 0 else 1  # tells the compiler how loads are aligned
    _quantize_rows[(T,)](x, scale if scale_columns is None else scale_columns, out, scale, stride // unit, K=K,
                         SCALED=scale_columns is not None, UNIT=unit, BLOCK=block,
                         num_warps=max(1, block // _PER_WARP))
    return out, scale


def divide_rows(weight: Tensor, row_scales: Tensor, out: Tensor, *, transposed: bool) -> Tensor:
    """See `kernels.fp8.divide_rows`."""
    N, K = weight.shape
    tile = _TILE[transposed]
    _divide_rows[(triton.cdiv(N, tile["ROWS"]) * triton.cdiv(K, tile["COLUMNS"]),)](
        weight, row_scales, out, N, K, weight.stride(0), out.stride(0), TRANSPOSED=transposed, **tile)
    return out
