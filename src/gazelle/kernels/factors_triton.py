"""`kernels.factors` in Triton: one launch for all parts of a projection."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.factors import MOST_PARTS, Factors

_COLUMNS = 1024  # of A, a program
_ROWS = 128  # of B, a program


@triton.jit
def _add_one(dA, dB, a, b, scale, row, column, n, r, inputs, border, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
             RANK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(inputs, COLUMNS)
    kind = a.dtype.element_ty
    if program < r * blocks:
        of_a = program // blocks
        across = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        place = of_a * inputs + across
        found = tl.load(dA + (column + of_a) * inputs + across, mask=across < inputs, other=0.0).to(tl.float32)
        held = tl.load(a + place, mask=across < inputs, other=0.0).to(tl.float32)
        tl.store(a + place, (held + found).to(kind), mask=across < inputs)
    elif program < r * blocks + tl.cdiv(n, ROWS):
        of_b = (program - r * blocks) * ROWS + tl.arange(0, ROWS)
        across = tl.arange(0, RANK)
        mask = (of_b < n)[:, None] & (across < r)[None, :]
        source = dB + (row + of_b)[:, None].to(tl.int64) * border + column + across[None, :]
        found = tl.load(source, mask=mask, other=0.0)
        place = of_b[:, None] * r + across[None, :]
        held = tl.load(b + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(b + place, (held + scale * found.to(tl.float32)).to(kind), mask=mask)


@triton.jit
def _add(dA, dB, a0, a1, a2, b0, b1, b2, s0, s1, s2, row0, row1, row2, c0, c1, c2, n0, n1, n2, r0, r1, r2, inputs,
         border, COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    part = tl.program_id(1)
    if part == 0:
        _add_one(dA, dB, a0, b0, s0, row0, c0, n0, r0, inputs, border, COLUMNS, ROWS, RANK)
    elif part == 1:
        _add_one(dA, dB, a1, b1, s1, row1, c1, n1, r1, inputs, border, COLUMNS, ROWS, RANK)
    else:
        _add_one(dA, dB, a2, b2, s2, row2, c2, n2, r2, inputs, border, COLUMNS, ROWS, RANK)


def add_factor_gradients(dA: Tensor, dB: Tensor, parts: Sequence[Factors]) -> None:
    """See `kernels.factors.add_factor_gradients`."""
    inputs, border = dA.shape[1], dB.shape[1]
    ranks = [part.a.shape[0] for part in parts]
    sizes = [part.b.shape[0] for part in parts]
    programs = max(r * triton.cdiv(inputs, _COLUMNS) + triton.cdiv(n, _ROWS)
                   for r, n in zip(ranks, sizes, strict=True))
    filled = [*parts, *[parts[0]] * (MOST_PARTS - len(parts))]  # those behind the last are never reached

    _add[(programs, len(parts))](
        dA, dB, *(part.a for part in filled), *(part.b for part in filled),
        *(float(part.scale) for part in filled), *(part.rows.start for part in filled),
        *(part.columns.start for part in filled), *(part.b.shape[0] for part in filled),
        *(part.a.shape[0] for part in filled), inputs, border, COLUMNS=_COLUMNS, ROWS=_ROWS,
        RANK=triton.next_power_of_2(max(ranks)), num_warps=4)
