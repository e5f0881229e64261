"""The gated unit of an MLP (https://arxiv.org/abs/2002.05202): act(gate) · up.

Shapes: T tokens, F intermediate; gate and up lie side by side in [T, 2F].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.factors import Factors

KINDS = ("silu", "gelu_tanh", "gelu")
MOST_RANKS = 64  # adapter columns that `gated_backward_sums` takes
MOST_PIECES = 16  # that it cuts tokens into


def gated(gate_up: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """act(gate) · up [T, F], in `out` if that is given."""
    if use_triton(gate_up):
        from gazelle.kernels import activation_triton

        return activation_triton.gated(gate_up, kind, out)
    gate, up = gate_up.chunk(2, -1)
    if gate.dtype in (torch.float32, torch.float64):
        if kind == "silu" and out is not None:
            return torch.ops.aten.silu.out(gate, out=out).mul_(up)
        y = _act(gate, kind)
        return y.mul_(up) if out is None else torch.mul(y, up, out=out)
    y = _act(gate.float(), kind) * up
    return y.to(gate.dtype) if out is None else out.copy_(y)


def gated_backward(gate_up: Tensor, dh: Tensor, kind: str, d_gate_up: Tensor, h: Tensor | None = None) -> Tensor:
    """The gradient [T, 2F] of gate and up.

    Args:
        gate_up: [T, 2F].
        dh: [T, F], the gradient of what `gated` gives.
        kind: "silu", "gelu_tanh" or "gelu".
        d_gate_up: where to write; may be `gate_up` itself.
        h: [T, F] that is filled with what `gated` gives.
    """
    if use_triton(gate_up):
        from gazelle.kernels import activation_triton

        return activation_triton.gated_backward(gate_up, dh, kind, d_gate_up, h)
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = (part.to(wide) for part in gate_up.chunk(2, -1))
    d = dh.to(wide)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    if kind == "silu" and gate_up.dtype == wide:  # in few passes over memory, and little of it new
        act = functional.silu(gate)
        if h is not None:
            torch.mul(act, up, out=h)
        slope = d * up  # before d_up is written, which may be up's own memory
        torch.mul(act, d, out=d_up)
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=d_gate)
        return d_gate_up
    act, slope = _act_and_slope(gate, kind)
    if h is not None:
        h.copy_(act * up)
    slope.mul_(up).mul_(d)  # before d_up is written, which may be up's own memory
    d_up.copy_(act.mul_(d))
    d_gate.copy_(slope)
    return d_gate_up


def gated_backward_sums(gate_up: Tensor, dh: Tensor, kind: str, z: Tensor, dz: Tensor, parts: Sequence[Factors],
                        columns: int) -> tuple[Tensor, Tensor]:
    """`gated_backward` in place, with what gradients of LoRA factors need of h and of its own result: for
    `kernels.factors.Sums`, without going through either of them again.

    Args:
        gate_up, dh, kind: as there.
        z: [T, R] of the projection that gave gate and up. dz: [T, R] of the one that takes h.
        parts: adapters of the former.
        columns: how many columns of dz belong to adapters; at most `MOST_RANKS`, as the columns of each of `parts`.

    Returns:
        dzᵀh [pieces, columns, F], and (d gate_up)ᵀz of each adapter [pieces, 2F, columns of the widest].
    """
    if use_triton(gate_up):
        from gazelle.kernels import activation_triton

        return activation_triton.gated_backward_sums(gate_up, dh, kind, z, dz, parts, columns)
    h = torch.empty_like(dh)
    gated_backward(gate_up, dh, kind, gate_up, h)
    wide = torch.promote_types(dh.dtype, torch.float32)
    of_b = torch.zeros(1, gate_up.shape[1], max(part.a.shape[0] for part in parts), dtype=wide, device=dh.device)
    for part in parts:
        of_b[0, part.rows, : part.a.shape[0]] = gate_up[:, part.rows].to(wide).t() @ z[:, part.columns].to(wide)
    return (dz[:, :columns].to(wide).t() @ h.to(wide))[None], of_b


def _act(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _act_and_slope(gate: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "silu":
        s = gate.sigmoid()
        act = gate * s
        return act, torch.addcmul(s, act, 1 - s)
    if kind == "gelu":
        cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        return gate * cdf, cdf + gate * torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    t = torch.tanh(inner)
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate * gate)
    return 0.5 * gate * (1 + t), slope
