"""`kernels.activation` in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gazelle.kernels.activation import MOST_PIECES
from gazelle.kernels.factors import Factors
from gazelle.kernels.factors_triton import cut

_BLOCK = 1024
# Of the sums, by measurement: many small programs at a time hide how long a step takes from its loads to its products.
_TOKENS, _COLUMNS, _WARPS, _STAGES, _PROGRAMS = 16, 64, 4, 3, 4096


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _act(g, KIND: tl.constexpr):
    """act(g) and its slope."""
    if KIND == "silu":
        s = tl.sigmoid(g)
        act = g * s
        slope = s + act * (1 - s)
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        act = g * cdf
        slope = cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        act = 0.5 * g * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * g * g)
    return act, slope


@triton.jit
def _forward(gate_up, out, width, g_t, o_t, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate_up + row * g_t + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * g_t + width + column, mask=mask, other=0.0).to(tl.float32)
    act, _ = _act(g, KIND)
    tl.store(out + row * o_t + column, (act * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(gate_up, dh, d_gate_up, h, width, g_t, dh_t, d_t, h_t, KIND: tl.constexpr, H: tl.constexpr,
              BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate_up + row * g_t + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * g_t + width + column, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dh + row * dh_t + column, mask=mask, other=0.0).to(tl.float32)
    act, slope = _act(g, KIND)
    if H:
        tl.store(h + row * h_t + column, (act * u).to(h.dtype.element_ty), mask=mask)
    tl.store(d_gate_up + row * d_t + column, (d * u * slope).to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(d_gate_up + row * d_t + width + column, (d * act).to(d_gate_up.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums(gate_up, dh, z, dz, of_a, of_b, tokens, width, columns, c_gate, r_gate, c_up, r_up, widest, g_t,
                   dh_t, z_t, dz_t, KIND: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
                   COLUMNS: tl.constexpr, RANKS_A: tl.constexpr, RANKS_B: tl.constexpr):
    piece = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i, j = tl.arange(0, RANKS_A), tl.arange(0, RANKS_B)
    inside = (c < width)[None, :]
    total_a = tl.zeros((COLUMNS, RANKS_A), tl.float32)
    total_gate = tl.zeros((COLUMNS, RANKS_B), tl.float32)
    total_up = tl.zeros((COLUMNS, RANKS_B), tl.float32)
    for step in range(STEPS):
        t = (piece * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        there = (t < tokens)[:, None]
        row = t.to(tl.int64)[:, None]
        at = gate_up + row * g_t + c[None, :]
        g = tl.load(at, mask=there & inside, other=0.0).to(tl.float32)
        u = tl.load(at + width, mask=there & inside, other=0.0).to(tl.float32)
        d = tl.load(dh + row * dh_t + c[None, :], mask=there & inside, other=0.0).to(tl.float32)
        act, slope = _act(g, KIND)
        kind = gate_up.dtype.element_ty
        h, d_gate, d_up = (act * u).to(kind), (d * u * slope).to(kind), (d * act).to(kind)
        tl.store(at, d_gate, mask=there & inside)
        tl.store(at + width, d_up, mask=there & inside)
        of_dz = tl.load(dz + row * dz_t + i[None, :], mask=there & (i < columns)[None, :], other=0.0)
        of_gate = tl.load(z + row * z_t + c_gate + j[None, :], mask=there & (j < r_gate)[None, :], other=0.0)
        of_up = tl.load(z + row * z_t + c_up + j[None, :], mask=there & (j < r_up)[None, :], other=0.0)
        total_a = tl.dot(tl.trans(h), of_dz, total_a, input_precision="ieee")
        total_gate = tl.dot(tl.trans(d_gate), of_gate, total_gate, input_precision="ieee")
        total_up = tl.dot(tl.trans(d_up), of_up, total_up, input_precision="ieee")
    tl.store(of_a + (piece * columns + i).to(tl.int64)[None, :] * width + c[:, None], total_a,
             mask=(c < width)[:, None] & (i < columns)[None, :])
    place = of_b + (piece * 2 * width + c).to(tl.int64)[:, None] * widest + j[None, :]
    mask = (c < width)[:, None] & (j < widest)[None, :]
    tl.store(place, total_gate, mask=mask)
    tl.store(place + width * widest, total_up, mask=mask)


def gated(gate_up: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """See `kernels.activation.gated`."""
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(T, width, dtype=gate_up.dtype, device=gate_up.device)
    _forward[(T, triton.cdiv(width, _BLOCK))](gate_up, out, width, gate_up.stride(0), out.stride(0), KIND=kind,
                                              BLOCK=_BLOCK, num_warps=4)
    return out


def gated_backward(gate_up: Tensor, dh: Tensor, kind: str, d_gate_up: Tensor, h: Tensor | None = None) -> Tensor:
    """See `kernels.activation.gated_backward`."""
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    other = dh if h is None else h
    _backward[(T, triton.cdiv(width, _BLOCK))](
        gate_up, dh, d_gate_up, other, width, gate_up.stride(0), dh.stride(0), d_gate_up.stride(0), other.stride(0),
        KIND=kind, H=h is not None, BLOCK=_BLOCK, num_warps=4)
    return d_gate_up


def gated_backward_sums(gate_up: Tensor, dh: Tensor, kind: str, z: Tensor, dz: Tensor, parts: Sequence[Factors],
                        columns: int) -> tuple[Tensor, Tensor]:
    """See `kernels.activation.gated_backward_sums`."""
    tokens, width = dh.shape
    widest = max(part.a.shape[0] for part in parts)
    gate, up = (next(((part.columns.start, part.a.shape[0]) for part in parts
                      if part.rows.start <= row < part.rows.stop), (0, 0)) for row in (0, width))
    blocks = triton.cdiv(width, _COLUMNS)
    pieces, steps = cut(tokens, blocks, _TOKENS, min(_PROGRAMS, MOST_PIECES * blocks))
    of_a = torch.empty(pieces, columns, width, dtype=torch.float32, device=dh.device)
    of_b = torch.empty(pieces, 2 * width, widest, dtype=torch.float32, device=dh.device)
    _backward_sums[(blocks, pieces)](
        gate_up, dh, z, dz, of_a, of_b, tokens, width, columns, *gate, *up, widest, gate_up.stride(0),
        dh.stride(0), z.stride(0), dz.stride(0), KIND=kind, STEPS=steps, TOKENS=_TOKENS, COLUMNS=_COLUMNS,
        RANKS_A=max(16, triton.next_power_of_2(columns)), RANKS_B=max(16, triton.next_power_of_2(widest)),
        num_warps=_WARPS, num_stages=_STAGES)
    return of_a, of_b
