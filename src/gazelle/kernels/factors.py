"""Gradients of the LoRA factors of one projection, y = [x, xAᵀ]·[W, sB]ᵀ, added to where they are gathered.

Shapes: T tokens, N outputs and K inputs of all parts, R adapter columns; n and r of one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton
from gazelle.kernels.norm import rms_norm

MOST_PARTS = 3  # of a projection: queries, keys and values


@dataclass(frozen=True)
class Factors:
    """One adapter: `a` [r, K] and `b` [n, r], or their gradients; its scale, its rows of N and columns of R."""

    a: Tensor
    b: Tensor
    scale: float
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Normed:
    """A projection's input that came from a norm, and is made anew where it is read.

    Attributes:
        x: [T, K], what went into the norm.
        weight, eps, offset: as in `kernels.norm.rms_norm`.
        rstd: [T] float32, from its forward pass.
    """

    x: Tensor
    weight: Tensor
    eps: float
    offset: float
    rstd: Tensor

    def made(self) -> Tensor:
        """What the norm gave [T, K]."""
        return rms_norm(self.x, self.weight, self.eps, self.offset)[0]


@dataclass(frozen=True)
class Sums:
    """Products that were summed over pieces of the tokens already, in float32: dzᵀx [pieces, columns of all adapters,
    K], and dyᵀz [pieces, N, columns of the widest adapter].
    """

    a: Tensor | None = None
    b: Tensor | None = None


NO_SUMS = Sums()


def add_factor_gradients(dy: Tensor, x: Tensor | Normed | None, z: Tensor, dz: Tensor, parts: Sequence[Factors],
                         sums: Sums = NO_SUMS) -> None:
    """Add dzᵀx to each part's `a`, and scale · dyᵀz to its `b`: sums in float32, the same in every run.

    Args:
        dy: [T, N]. x: [T, K]. z = xAᵀ and dz = s·dyB: [T, R]. Rows may lie apart.
        parts: at most `MOST_PARTS`, their tensors contiguous and of one type.
        sums: what need not be summed here; with `sums.a`, x may be None.
    """
    if use_triton(dy):
        from gazelle.kernels import factors_triton

        factors_triton.add_factor_gradients(dy, x, z, dz, parts, sums)
        return
    wide = torch.promote_types(dy.dtype, torch.float32)
    inner = x.made() if isinstance(x, Normed) else x
    for part in parts:
        if sums.a is not None:
            part.a.add_(sums.a.sum(0)[part.columns])
        elif inner is not None:
            part.a.add_(dz[:, part.columns].to(wide).t() @ inner.to(wide))
        summed = dy[:, part.rows].to(wide).t() @ z[:, part.columns].to(wide) if sums.b is None \
            else sums.b.sum(0)[part.rows, : part.a.shape[0]]
        part.b.add_(summed, alpha=part.scale)
