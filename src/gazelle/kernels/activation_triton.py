"""`kernels.activation` in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


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
