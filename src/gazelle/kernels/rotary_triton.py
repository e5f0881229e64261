"""`kernels.rotary` in Triton: a program takes some heads of one token."""

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # of a program


@triton.jit
def _rotate(x, cos, sin, heads, half, x_t, x_h, c_t, s_t, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    c = tl.load(cos + token * c_t + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * s_t + i, mask=i < half, other=0.0).to(tl.float32)[None, :] * sign
    at = x + token * x_t + (head * x_h)[:, None] + i[None, :]
    mask = (head < heads)[:, None] & (i < half)[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (a * c - b * s).to(x.dtype.element_ty), mask=mask)
    tl.store(at + half, (b * c + a * s).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _into(q, k, v, cos, sin, out, h, g, width, half, q_t, q_h, k_t, k_h, v_t, v_h, c_t, s_t, o_t, HEADS: tl.constexpr,
          WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, WIDTH)
    inside = (i < width)[None, :]
    of_q, of_k = (head < h)[:, None], ((head >= h) & (head < h + g))[:, None]
    of_v = ((head >= h + g) & (head < h + 2 * g))[:, None]
    # The partner of an element: half a rotation further, or back.
    turns = i < 2 * half
    partner = tl.where(turns, tl.where(i < half, i + half, i - half), i)[None, :]
    at_q = q + token * q_t + (head * q_h)[:, None]
    at_k = k + token * k_t + ((head - h) * k_h)[:, None]
    at_v = v + token * v_t + ((head - h - g) * v_h)[:, None]
    a = tl.load(at_q + i[None, :], mask=of_q & inside, other=0.0).to(tl.float32)
    a += tl.load(at_k + i[None, :], mask=of_k & inside, other=0.0).to(tl.float32)
    b = tl.load(at_q + partner, mask=of_q & inside, other=0.0).to(tl.float32)
    b += tl.load(at_k + partner, mask=of_k & inside, other=0.0).to(tl.float32)
    angle = tl.where(i < half, i, i - half)
    c = tl.load(cos + token * c_t + angle, mask=turns, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * s_t + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
    y = a * c + b * tl.where(i < half, 1.0, -1.0)[None, :] * s
    y += tl.load(at_v + i[None, :], mask=of_v & inside, other=0.0).to(tl.float32)
    place = out + token * o_t + (head * width)[:, None] + i[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(head < h + 2 * g)[:, None] & inside)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """See `kernels.rotary.rotate_`."""
    T, heads, _ = x.shape
    half = cos.shape[-1] // 2
    _rotate[(T, triton.cdiv(heads, _HEADS))](x, cos, sin, heads, half, x.stride(0), x.stride(1), cos.stride(0),
                                             sin.stride(0), -1.0 if inverse else 1.0, HEADS=_HEADS,
                                             HALF=triton.next_power_of_2(half), num_warps=2)
    return x


def rotate_into(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """See `kernels.rotary.rotate_into`."""
    T, h, width = q.shape
    g = k.shape[1]
    _into[(T, triton.cdiv(h + 2 * g, _HEADS))](
        q, k, v, cos, sin, out, h, g, width, cos.shape[-1] // 2, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), cos.stride(0), sin.stride(0), out.stride(0), HEADS=_HEADS,
        WIDTH=triton.next_power_of_2(width), num_warps=4)
    return out
