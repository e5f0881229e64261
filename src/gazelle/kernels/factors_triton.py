"""`kernels.factors` in Triton: one launch for all sums over tokens, in pieces, and one that adds the pieces up.

A program sums one block of columns of x (for A) or of dy (for B) over one piece of the tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.factors import MOST_PARTS, NO_SUMS, Factors, Normed, Sums

_TOKENS = 64  # of a step of the sum
_BLOCK = 64  # columns of x or dy, a program
_RANKS = 64  # adapter columns at most, a program
_PROGRAMS = 1024  # to keep a GPU busy: tokens are cut into so many pieces that there are about as many
_SHORTEST = 256  # tokens of a piece
_COLUMNS = 1024  # of A, a program of the second launch
_ROWS = 128  # of B


@triton.jit
def _sum(dy, x, z, dz, rstd, weight, offset, sums_a, sums_b, tokens, inputs, outputs, columns, row0, row1, row2, n0, n1,
         n2, c0, c1, c2, r0, r1, r2, dy_t, x_t, z_t, dz_t, of_a, of_b0, of_b1, width, NORMED: tl.constexpr,
         STEPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr):
    program = tl.program_id(0)
    split = tl.program_id(1)
    i = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    for_a = program < of_a
    # What is summed up: a block of `source`, as far as `limit`, times columns of `factor`, as far as `ranks`.
    if for_a:
        source, stride, first, limit = x, x_t, program * BLOCK, inputs
        factor, factor_stride, column, ranks = dz, dz_t, 0, columns
    else:
        factor, factor_stride = z, z_t
        at = program - of_a
        if at < of_b0:
            column, ranks, begin, limit, block = c0, r0, row0, row0 + n0, at
        elif at < of_b0 + of_b1:
            column, ranks, begin, limit, block = c1, r1, row1, row1 + n1, at - of_b0
        else:
            column, ranks, begin, limit, block = c2, r2, row2, row2 + n2, at - of_b0 - of_b1
        source, stride, first = dy, dy_t, begin + block * BLOCK
    c = first + tl.arange(0, BLOCK)
    inside, used = (c < limit)[None, :], (i < ranks)[None, :]
    if NORMED:
        scale = tl.load(weight + c, mask=(c < limit) & for_a, other=0.0).to(tl.float32) + offset
        scale = tl.where(for_a, scale, 1.0)
    total = tl.zeros((BLOCK, RANKS), tl.float32)
    end = tl.where(tl.program_id(2) * RANKS < ranks, tokens, 0)  # a later block of columns may have none for a part
    for step in range(STEPS):
        t = (split * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        there = (t < end)[:, None]
        place = t.to(tl.int64)[:, None]
        v = tl.load(source + place * stride + c[None, :], mask=there & inside, other=0.0)
        if NORMED:
            r = tl.load(rstd + t, mask=(t < end) & for_a, other=1.0)
            v = (v.to(tl.float32) * r[:, None] * scale[None, :]).to(v.dtype)
        f = tl.load(factor + place * factor_stride + column + i[None, :], mask=there & used, other=0.0)
        total = tl.dot(tl.trans(v), f, total, input_precision="ieee")
    if for_a:
        out = sums_a + (split * columns + i).to(tl.int64)[None, :] * inputs + c[:, None]
        tl.store(out, total, mask=(c < limit)[:, None] & used)
    else:
        out = sums_b + (split * outputs + c).to(tl.int64)[:, None] * width + i[None, :]
        tl.store(out, total, mask=(c < limit)[:, None] & used)


@triton.jit
def _add_one(sums_a, sums_b, a, b, scale, row, column, n, r, of_a, of_b, inputs, outputs, columns, width,
             PIECES_A: tl.constexpr, PIECES_B: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
             RANK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(inputs, COLUMNS)
    kind = a.dtype.element_ty
    if program < r * blocks:
        line = program // blocks
        across = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = across < inputs
        found = tl.zeros((COLUMNS,), tl.float32)
        for piece in range(PIECES_A):
            source = sums_a + (piece * columns + column + line) * inputs + across
            found += tl.load(source, mask=inside & (piece < of_a), other=0.0)
        place = line * inputs + across
        held = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(a + place, (held + found).to(kind), mask=inside)
    elif program < r * blocks + tl.cdiv(n, ROWS):
        lines = (program - r * blocks) * ROWS + tl.arange(0, ROWS)
        across = tl.arange(0, RANK)
        mask = (lines < n)[:, None] & (across < r)[None, :]
        total = tl.zeros((ROWS, RANK), tl.float32)
        for piece in range(PIECES_B):
            source = sums_b + (piece * outputs + row + lines).to(tl.int64)[:, None] * width + across[None, :]
            total += tl.load(source, mask=mask & (piece < of_b), other=0.0)
        place = lines[:, None] * r + across[None, :]
        held = tl.load(b + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(b + place, (held + scale * total).to(kind), mask=mask)


@triton.jit
def _add(sums_a, sums_b, a0, a1, a2, b0, b1, b2, s0, s1, s2, row0, row1, row2, n0, n1, n2, c0, c1, c2, r0, r1, r2,
         of_a, of_b, inputs, outputs, columns, width, PIECES_A: tl.constexpr, PIECES_B: tl.constexpr,
         COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    part = tl.program_id(1)
    if part == 0:
        _add_one(sums_a, sums_b, a0, b0, s0, row0, c0, n0, r0, of_a, of_b, inputs, outputs, columns, width, PIECES_A,
                 PIECES_B, COLUMNS, ROWS, RANK)
    elif part == 1:
        _add_one(sums_a, sums_b, a1, b1, s1, row1, c1, n1, r1, of_a, of_b, inputs, outputs, columns, width, PIECES_A,
                 PIECES_B, COLUMNS, ROWS, RANK)
    else:
        _add_one(sums_a, sums_b, a2, b2, s2, row2, c2, n2, r2, of_a, of_b, inputs, outputs, columns, width, PIECES_A,
                 PIECES_B, COLUMNS, ROWS, RANK)


def add_factor_gradients(dy: Tensor, x: Tensor | Normed | None, z: Tensor, dz: Tensor, parts: Sequence[Factors],
                         sums: Sums = NO_SUMS) -> None:
    """See `kernels.factors.add_factor_gradients`."""
    if sums.a is not None:
        inputs = sums.a.shape[2]
    elif x is not None:
        inputs = (x.x if isinstance(x, Normed) else x).shape[1]
    columns = parts[-1].columns.stop
    width = max(part.a.shape[0] for part in parts)
    spare = MOST_PARTS - len(parts)
    filled = [*parts, *[parts[0]] * spare]  # those behind the last are never reached
    sizes = [part.b.shape[0] for part in parts]
    places = (*(part.rows.start for part in filled), *(part.b.shape[0] for part in filled),
              *(part.columns.start for part in filled), *(part.a.shape[0] for part in filled))
    a, b = sums.a, sums.b
    if a is None or b is None:
        made_a, made_b = _summed(dy, x, z, dz, places, sizes, inputs if a is None else 0, columns, width,
                                 wants_b=b is None)
        a, b = made_a if a is None else a, made_b if b is None else b
    adding = max(part.a.shape[0] * triton.cdiv(inputs, _COLUMNS) + triton.cdiv(size, _ROWS)
                 for part, size in zip(parts, sizes, strict=True))
    _add[(adding, len(parts))](
        a, b, *(part.a for part in filled), *(part.b for part in filled), *(float(part.scale) for part in filled),
        *places, len(a), len(b), inputs, dy.shape[1], columns, width, PIECES_A=triton.next_power_of_2(len(a)),
        PIECES_B=triton.next_power_of_2(len(b)), COLUMNS=_COLUMNS, ROWS=_ROWS, RANK=triton.next_power_of_2(width),
        num_warps=4)


def _summed(dy: Tensor, x: Tensor | Normed | None, z: Tensor, dz: Tensor, places: tuple[int, ...], sizes: list[int],
            inputs: int, columns: int, width: int, *, wants_b: bool) -> tuple[Tensor, Tensor]:
    """Sums for A unless `inputs` is 0, and for B if they are wanted."""
    source = x.x if isinstance(x, Normed) else dy if x is None else x
    tokens, outputs = dy.shape
    programs = [triton.cdiv(size, _BLOCK) for size in (inputs, *(sizes if wants_b else ()))]
    ranks = min(_RANKS, max(16, triton.next_power_of_2(columns)))  # 16: the least that a product takes
    chunks = triton.cdiv(columns, ranks)
    pieces, steps = cut(tokens, sum(programs) * chunks, _TOKENS)
    of_a = torch.empty(pieces, columns, inputs, dtype=torch.float32, device=dy.device)
    of_b = torch.empty(pieces, outputs if wants_b else 0, width, dtype=torch.float32, device=dy.device)
    normed = isinstance(x, Normed) and inputs > 0
    norm = (x.rstd, x.weight, x.offset) if isinstance(x, Normed) else (z, z, 0.0)
    _sum[(sum(programs), pieces, chunks)](
        dy, source, z, dz, *norm, of_a, of_b, tokens, inputs, outputs, columns, *places, dy.stride(0),
        source.stride(0), z.stride(0), dz.stride(0), *[*programs, 0, 0, 0][:3], width, NORMED=normed, STEPS=steps,
        TOKENS=_TOKENS, BLOCK=_BLOCK, RANKS=ranks, num_warps=4, num_stages=4)
    return of_a, of_b


def cut(tokens: int, programs: int, step: int, most: int = _PROGRAMS) -> tuple[int, int]:
    """Into how many pieces tokens are cut for so many programs each, and how many steps a piece has.

    Steps are powers of two, for which kernels are compiled, so that batches of many lengths share a few.
    """
    pieces = max(1, min(most // programs, triton.cdiv(tokens, _SHORTEST)))
    steps = triton.next_power_of_2(triton.cdiv(tokens, pieces * step))
    return triton.cdiv(tokens, steps * step), steps
