"""`kernels.border` in Triton: one launch writes the rows of A and the columns of B of up to three adapters."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.factors import Factors

_COLUMNS = 1024  # of A, a program
_ROWS = 64  # of B, a program
_PARTS = 3  # a launch


@triton.jit
def _fill_one(to_a, to_b, a, b, scale, first_row, n, inputs, border, first, r, a_rows, a_row, b_row, a_line, b_line,
              COLUMNS: tl.constexpr, ROWS: tl.constexpr, BORDER: tl.constexpr):
    program = tl.program_id(0)
    kind = to_a.dtype.element_ty
    blocks = tl.cdiv(inputs, COLUMNS)
    a_programs = a_rows * blocks
    if program < a_programs:
        of_a = program // blocks
        across = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        factors = tl.load(a + of_a * a_row + across, mask=(across < inputs) & (of_a < r), other=0.0)
        begin = (first + of_a).to(tl.int64) * a_line
        tl.store(to_a + begin + across, factors.to(kind), mask=across < inputs)
    elif program < a_programs + tl.cdiv(n, ROWS):
        row = (program - a_programs) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BORDER)
        own = (column >= first) & (column < first + r)
        value = tl.load(b + row[:, None] * b_row + (column - first)[None, :], mask=(row < n)[:, None] & own[None, :],
                        other=0.0)
        place = (first_row + row).to(tl.int64)[:, None] * b_line + column[None, :]
        tl.store(to_b + place, (value.to(tl.float32) * scale).to(kind),
                 mask=(row < n)[:, None] & (column < border)[None, :])


@triton.jit
def _fill(to_a, to_b, a0, a1, a2, b0, b1, b2, s0, s1, s2, row0, row1, row2, n0, n1, n2, c0, c1, c2, r0, r1, r2, A0, A1,
          A2, ar0, ar1, ar2, br0, br1, br2, inputs, border, a_line, b_line, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
          BORDER: tl.constexpr):
    part = tl.program_id(1)
    if part == 0:
        _fill_one(to_a, to_b, a0, b0, s0, row0, n0, inputs, border, c0, r0, A0, ar0, br0, a_line,
                  b_line, COLUMNS, ROWS, BORDER)
    elif part == 1:
        _fill_one(to_a, to_b, a1, b1, s1, row1, n1, inputs, border, c1, r1, A1, ar1, br1, a_line,
                  b_line, COLUMNS, ROWS, BORDER)
    else:
        _fill_one(to_a, to_b, a2, b2, s2, row2, n2, inputs, border, c2, r2, A2, ar2, br2, a_line,
                  b_line, COLUMNS, ROWS, BORDER)


def fill_borders(a: Tensor, b: Tensor, parts: Sequence[Factors]) -> None:
    """See `kernels.border.fill_borders`."""
    for at in range(0, len(parts), _PARTS):
        _fill_some(a, b, parts[at : at + _PARTS], last=at + _PARTS >= len(parts))


def _fill_some(a: Tensor, b: Tensor, parts: Sequence[Factors], *, last: bool) -> None:
    border, inputs = a.shape
    # The columns behind the last adapter's are nobody's: their rows of A are zero.
    a_rows = [part.b.shape[1] for part in parts]
    if last:
        a_rows[-1] = border - parts[-1].columns.start
    blocks = triton.cdiv(inputs, _COLUMNS)
    programs = max(rows * blocks + triton.cdiv(part.b.shape[0], _ROWS)
                   for rows, part in zip(a_rows, parts, strict=True))
    spare = _PARTS - len(parts)  # arguments that no program reads
    filled, a_rows = [*parts, *[parts[0]] * spare], [*a_rows, *[0] * spare]
    _fill[(programs, len(parts))](
        a, b, *(part.a for part in filled), *(part.b for part in filled), *(float(part.scale) for part in filled),
        *(part.rows.start for part in filled), *(part.b.shape[0] for part in filled),
        *(part.columns.start for part in filled), *(part.b.shape[1] for part in filled), *a_rows,
        *(part.a.stride(0) for part in filled), *(part.b.stride(0) for part in filled), inputs, border, a.stride(0),
        b.stride(0), COLUMNS=_COLUMNS, ROWS=_ROWS, BORDER=triton.next_power_of_2(border), num_warps=4)
