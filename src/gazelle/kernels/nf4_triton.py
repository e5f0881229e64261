"""`kernels.nf4` in Triton, bound by memory: 2.5 bytes a weight.

A thread takes whole words of 32 bits, which are 8 weights of one block and 16 bytes of a 16-bit `out`: one scale and
one store a word. Rows that are not whole words go weight by weight, which is several times slower.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.fp8_triton import divided_by
from gazelle.kernels.nf4 import Nested


@dataclass(frozen=True)
class Launch:
    """What a program takes: `words` words of the flat matrix.

    Where it transposes, `words` words of each of so many rows that a thread gets `depth` of them.

    lookup: how an index becomes its value: "load" it from the table, which stays in L1, or "shuffle" it from the lane
        that holds it in a register, which takes no address arithmetic but is NVIDIA's.
    spread: neighbouring words go to neighbouring threads, so values are stored from where they were computed. Otherwise
        a thread loads 16 bytes, and values change threads through shared memory.
    """

    words: int
    warps: int
    lookup: str = "load"
    spread: bool = True
    depth: int = 1


LAUNCHES = {
    "load 512": Launch(512, 4),
    "load 1024": Launch(1024, 4),
    "load wide": Launch(1024, 4, spread=False),
    "shuffle 128": Launch(128, 4, "shuffle"),
    "shuffle 256": Launch(256, 4, "shuffle"),
    "shuffle 512": Launch(512, 4, "shuffle"),
    "shuffle 1024": Launch(1024, 4, "shuffle"),
    "shuffle 1024x8": Launch(1024, 8, "shuffle"),
    "shuffle wide": Launch(1024, 4, "shuffle", spread=False),
}
TRANSPOSED_LAUNCHES = {
    "load 16x8": Launch(16, 8, depth=8),
    "shuffle 16x8": Launch(16, 8, "shuffle", depth=8),  # words x depth: 128 rows with 8 warps
    "shuffle 16x16": Launch(16, 8, "shuffle", depth=16),
    "shuffle 16x16 4": Launch(16, 4, "shuffle", depth=16),
    "shuffle 8x4": Launch(8, 8, "shuffle", depth=4),
    "shuffle 8x16": Launch(8, 4, "shuffle", depth=16),
    "shuffle 32x16": Launch(32, 8, "shuffle", depth=16),
}
_BEST = {False: LAUNCHES["load 512"], True: TRANSPOSED_LAUNCHES["load 16x8"]}
_BEST_NVIDIA = {False: LAUNCHES["shuffle 512"], True: TRANSPOSED_LAUNCHES["shuffle 16x8"]}
_ELEMENTS = (8, 256)  # rows and columns of the tile of `_by_weights`


@triton.jit
def _scales(block, mask, absmax, code2, absmax2, offset, BLOCK2: tl.constexpr, NESTED: tl.constexpr):
    """The scale of each block. Compiled without fused multiply-add, since bitsandbytes rounds before it adds."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        second = tl.load(absmax2 + block // BLOCK2, mask=mask, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32), mask=mask, other=0.0) * second + tl.load(offset)
    return scale


@triton.jit
def _shuffled(words, code):
    """The 8 values of each word. Lanes i and i + 16 hold value i, so the bit above an index does no harm."""
    return tl.inline_asm_elementwise(
        asm="""
        {
            .reg .b32 lane, value, index;
            .reg .b64 place;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 place, lane, 4, $9;
            ld.global.nc.b32 value, [place];
            shr.u32 index, $8, 4;
            shfl.sync.idx.b32 $0, value, index, 31, -1;
            shfl.sync.idx.b32 $1, value, $8, 31, -1;
            shr.u32 index, $8, 12;
            shfl.sync.idx.b32 $2, value, index, 31, -1;
            shr.u32 index, $8, 8;
            shfl.sync.idx.b32 $3, value, index, 31, -1;
            shr.u32 index, $8, 20;
            shfl.sync.idx.b32 $4, value, index, 31, -1;
            shr.u32 index, $8, 16;
            shfl.sync.idx.b32 $5, value, index, 31, -1;
            shr.u32 index, $8, 28;
            shfl.sync.idx.b32 $6, value, index, 31, -1;
            shr.u32 index, $8, 24;
            shfl.sync.idx.b32 $7, value, index, 31, -1;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l",  # & since outputs are written before inputs are read
        args=[words, code],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,  # all lanes have to take part, so it must not move into a branch
        pack=1,
    )


@triton.jit
def _values(words, scale, code, LOOKUP: tl.constexpr):
    """The weights of each word, in three new last dimensions."""
    if LOOKUP == "shuffle":
        x0, x1, x2, x3, x4, x5, x6, x7 = _shuffled(words, code)
    else:
        x0 = tl.load(code + ((words >> 4) & 15))
        x1 = tl.load(code + (words & 15))
        x2 = tl.load(code + ((words >> 12) & 15))
        x3 = tl.load(code + ((words >> 8) & 15))
        x4 = tl.load(code + ((words >> 20) & 15))
        x5 = tl.load(code + ((words >> 16) & 15))
        x6 = tl.load(code + ((words >> 28) & 15))
        x7 = tl.load(code + ((words >> 24) & 15))
    # What is joined last lies closest together.
    even = tl.join(tl.join(x0 * scale, x4 * scale), tl.join(x2 * scale, x6 * scale))
    odd = tl.join(tl.join(x1 * scale, x5 * scale), tl.join(x3 * scale, x7 * scale))
    return tl.join(even, odd)


@triton.jit(do_not_specialize=["total", "stride"])
def _flat(words, code, absmax, code2, absmax2, offset, row_scales, out, total, stride, K8: tl.constexpr,
          SHIFT: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, UNIT: tl.constexpr,
          LOOKUP: tl.constexpr, SPREAD: tl.constexpr, WORDS: tl.constexpr):
    start = tl.program_id(0) * WORDS
    at = start + tl.arange(0, WORDS)
    mask = at < total
    place = words + at
    if SPREAD:
        place = tl.max_contiguous(place, [1])
    data = tl.load(place, mask=mask, other=0)
    scale = _scales(at >> SHIFT, mask, absmax, code2, absmax2, offset, BLOCK2, NESTED)
    if SCALED:
        scale = scale * divided_by(tl.load(row_scales + at // K8, mask=mask, other=1.0))
    value = tl.reshape(_values(data, scale, code, LOOKUP), (WORDS * 8,)).to(out.dtype.element_ty)
    # Counted in words, since a matrix can have 2³¹ weights.
    inside = tl.arange(0, WORDS * 8)
    at = start + inside // 8
    n = at // K8
    target = out + n.to(tl.int64) * (stride * UNIT) + ((at - n * K8) * 8 + inside % 8)
    if SPREAD:
        target = tl.max_contiguous(target, [8])
    tl.store(target, value, mask=at < total)


@triton.jit(do_not_specialize=["K8", "stride"])
def _transposed(words, code, absmax, code2, absmax2, offset, row_scales, out, N, K8, stride, SHIFT: tl.constexpr,
                BLOCK2: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, LOOKUP: tl.constexpr,
                GROUPS: tl.constexpr, DEPTH: tl.constexpr, WORDS: tl.constexpr):
    columns = tl.cdiv(K8, WORDS)
    word_at = tl.program_id(0) % columns * WORDS
    row_at = tl.program_id(0) // columns * (GROUPS * DEPTH)
    # A thread takes DEPTH rows below each other, which lie together in `out` and move through shared memory together.
    inside = tl.arange(0, DEPTH * GROUPS * WORDS)
    n = row_at + inside // WORDS % GROUPS * DEPTH + inside // (GROUPS * WORDS)
    w = word_at + inside % WORDS
    mask = (n < N) & (w < K8)
    at = n * K8 + w
    data = tl.load(tl.max_contiguous(words + at, [1]), mask=mask, other=0)
    scale = _scales(at >> SHIFT, mask, absmax, code2, absmax2, offset, BLOCK2, NESTED)
    scale = scale * divided_by(tl.load(row_scales + n, mask=n < N, other=1.0))
    value = tl.reshape(_values(data, scale, code, LOOKUP).to(out.dtype.element_ty), (DEPTH, GROUPS, WORDS * 8))
    value = tl.reshape(tl.permute(value, (2, 1, 0)), (WORDS * 8, GROUPS * DEPTH))
    k = word_at * 8 + tl.arange(0, WORDS * 8)
    row = row_at + tl.arange(0, GROUPS * DEPTH)
    target = out + k[:, None].to(tl.int64) * (stride * UNIT) + row[None, :]
    tl.store(target, value, mask=(k < K8 * 8)[:, None] & (row < N)[None, :])


@triton.jit(do_not_specialize=["N", "K", "stride"])
def _by_weights(packed, code, absmax, code2, absmax2, offset, row_scales, out, N, K, stride, BLOCK: tl.constexpr,
                BLOCK2: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.cdiv(K, COLUMNS)
    n = (tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = (tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    mask = (n < N) & (k < K)
    at = n * K + k
    byte = tl.load(packed + at // 2, mask=mask, other=0).to(tl.int32)
    index = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    scale = _scales(at // BLOCK, mask, absmax, code2, absmax2, offset, BLOCK2, NESTED)
    if SCALED:
        scale = scale * divided_by(tl.load(row_scales + n, mask=n < N, other=1.0))
    target = out + (k * stride + n if TRANSPOSED else n * stride + k)
    tl.store(target, (tl.load(code + index) * scale).to(out.dtype.element_ty), mask=mask)


def dequantize(packed: Tensor, code: Tensor, absmax: Tensor, nested: Nested | None, block: int, out: Tensor,
               row_scales: Tensor | None, *, transposed: bool, launch: Launch | None = None) -> Tensor:
    """See `kernels.nf4`. Triton's interpreter has no "shuffle"."""
    N, K = (out.shape[1], out.shape[0]) if transposed else out.shape
    code2, absmax2, offset, block2 = (code, code, code, 1) if nested is None else \
        (nested.code, nested.absmax, nested.offset, nested.block)
    tensors = (code, absmax, code2, absmax2, offset, code if row_scales is None else row_scales, out)
    flags: dict[str, Any] = {"BLOCK2": block2, "NESTED": nested is not None, "enable_fp_fusion": False}
    stride = out.stride(0)
    if K % 8 or packed.data_ptr() % 4:
        rows, columns = _ELEMENTS
        _by_weights[(triton.cdiv(N, rows) * triton.cdiv(K, columns),)](
            packed.flatten().view(torch.uint8), *tensors, N, K, stride, BLOCK=block, SCALED=row_scales is not None,
            TRANSPOSED=transposed, ROWS=rows, COLUMNS=columns, num_warps=4, **flags)
        return out
    if launch is None:
        nvidia = packed.is_cuda and torch.version.hip is None
        launch = (_BEST_NVIDIA if nvidia else _BEST)[transposed]
    unit = next(unit for unit in (16, 8, 1) if stride % unit == 0)  # tells the compiler how stores are aligned
    flags |= {"SHIFT": (block // 8).bit_length() - 1, "UNIT": unit, "LOOKUP": launch.lookup, "WORDS": launch.words,
              "num_warps": launch.warps}
    words, K8, stride = packed.flatten().view(torch.int32), K // 8, stride // unit
    if transposed:
        groups = 32 * launch.warps // launch.words
        grid = (triton.cdiv(N, groups * launch.depth) * triton.cdiv(K8, launch.words),)
        _transposed[grid](words, *tensors, N, K8, stride, GROUPS=groups, DEPTH=launch.depth, **flags)
    else:
        grid = (triton.cdiv(N * K8, launch.words),)
        _flat[grid](words, *tensors, N * K8, stride, K8=K8, SCALED=row_scales is not None,
                    SPREAD=launch.spread, **flags)
    return out
