"""`kernels.low_rank` in Triton: a program makes one tile of the sum."""

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64
_COLUMNS = 128
_RANKS = 64  # adapter columns at a time


@triton.jit
def _add(y, z, b, residual, out, tokens, width, ranks, y_t, z_t, b_n, b_r, r_t, o_t, RESIDUAL: tl.constexpr,
         TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None]
    mask = (token < tokens)[:, None] & (column < width)[None, :]
    total = tl.load(y + row * y_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
    for chunk in range(CHUNKS):
        i = chunk * RANKS + tl.arange(0, RANKS)
        of_z = tl.load(z + row * z_t + i[None, :], mask=(token < tokens)[:, None] & (i < ranks)[None, :], other=0.0)
        of_b = tl.load(b + column[None, :] * b_n + i[:, None] * b_r,
                       mask=(column < width)[None, :] & (i < ranks)[:, None], other=0.0)
        total = tl.dot(of_z, of_b, total, input_precision="ieee")
    if RESIDUAL:
        total += tl.load(residual + row * r_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * o_t + column[None, :], total.to(out.dtype.element_ty), mask=mask)


def add_low_rank(y: Tensor, z: Tensor, b: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    """See `kernels.low_rank.add_low_rank`."""
    (tokens, width), ranks = y.shape, z.shape[1]
    other = y if residual is None else residual
    columns = min(_RANKS, max(16, triton.next_power_of_2(ranks)))  # 16: the least that a product takes
    _add[(triton.cdiv(width, _COLUMNS), triton.cdiv(tokens, _TOKENS))](
        y, z, b, other, out, tokens, width, ranks, y.stride(0), z.stride(0), b.stride(0), b.stride(1), other.stride(0),
        out.stride(0), RESIDUAL=residual is not None, TOKENS=_TOKENS, COLUMNS=_COLUMNS,
        RANKS=columns, CHUNKS=triton.cdiv(ranks, columns), num_warps=4)
    return out
