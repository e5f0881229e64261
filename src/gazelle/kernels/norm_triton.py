"""`kernels.norm` in Triton: a program takes one wide row, or several narrow ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program
_PARTS = 256  # first-stage sums of a weight's gradient


@triton.jit
def _forward(x, w, out, rstd, rows, heads, width, eps, offset, x_t, x_h, o_t, o_h, ROWS: tl.constexpr,
             WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    token, head = (row // heads).to(tl.int64), row % heads
    v = tl.load(x + (token * x_t + head * x_h)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 1) / width + eps)
    tl.store(rstd + row, r, mask=row < rows)
    scale = tl.load(w + column, mask=column < width, other=0.0).to(tl.float32) + offset
    y = v * r[:, None] * scale[None, :]
    tl.store(out + (token * o_t + head * o_h)[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(dy, x, w, rstd, residual, out, rows, heads, width, offset, d_t, d_h, x_t, x_h, r_t, r_h, o_t, o_h,
              RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    token, head = (row // heads).to(tl.int64), row % heads
    v = tl.load(x + (token * x_t + head * x_h)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + (token * d_t + head * d_h)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    d = d * (tl.load(w + column, mask=column < width, other=0.0).to(tl.float32) + offset)[None, :]
    v = v * r
    g = r * (d - v * (tl.sum(d * v, 1) / width)[:, None])
    if RESIDUAL:
        at = residual + (token * r_t + head * r_h)[:, None] + column[None, :]
        g += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (token * o_t + head * o_h)[:, None] + column[None, :], g.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _weight(dy, x, rstd, sums, rows, width, d_t, x_t, PART: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    part = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for at in range(0, PART, ROWS):
        row = part * PART + at + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None]
        v = tl.load(x + place * x_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + place * d_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        total += tl.sum(v * d * r[:, None], 0)
    tl.store(sums + part * width + column, total, mask=column < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0,
             out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kernels.norm.rms_norm`."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, heads, width, grid = _grid(x)
    _forward[grid["grid"]](x, weight, out, rstd, rows, heads, width, eps, offset, *_strides(x), *_strides(out),
                           **grid["meta"])
    return out, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0,
                      residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See `kernels.norm.rms_norm_backward`."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, heads, width, grid = _grid(x)
    other = x if residual is None else residual
    _backward[grid["grid"]](dy, x, weight, rstd, other, out, rows, heads, width, offset, *_strides(dy), *_strides(x),
                            *_strides(other), *_strides(out), RESIDUAL=residual is not None, **grid["meta"])
    return out


def rms_norm_weight_grad(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """See `kernels.norm.rms_norm_weight_grad`."""
    if x.dim() == 3:
        dy, x, rstd = dy.flatten(0, 1), x.flatten(0, 1), rstd.flatten()
    rows, width = x.shape
    part = max(16, triton.next_power_of_2(triton.cdiv(rows, _PARTS)))
    sums = torch.empty(triton.cdiv(rows, part), width, dtype=torch.float32, device=x.device)
    _weight[(len(sums), triton.cdiv(width, 128))](dy, x, rstd, sums, rows, width, dy.stride(0), x.stride(0), PART=part,
                                                  ROWS=16, WIDTH=128)
    return sums.sum(0)


def _strides(x: Tensor) -> tuple[int, int]:
    return (x.stride(0), x.stride(1) if x.dim() == 3 else 0)


def _grid(x: Tensor) -> tuple[int, int, int, dict]:
    heads = x.shape[1] if x.dim() == 3 else 1
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rows = max(1, min(32, _ELEMENTS // block))
    warps = 8 if rows * block >= 4096 else 4
    return (x.shape[0] * heads, heads, width,
            {"grid": (triton.cdiv(x.shape[0] * heads, rows),),
             "meta": {"ROWS": rows, "WIDTH": block, "num_warps": warps}})
