"""A `Projection` for CPUs: oneDNN's products over [[W], [A]], and sB beside them.

oneDNN takes rows of x that lie apart, but weights without gaps only, so the matrix has no border on the right. B is
multiplied part by part: on a CPU another pass over y costs less than the zeros of the border do.

Shapes: as in `engine.linear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gazelle.engine import fp8
from gazelle.engine.linear import Bordered, Linear, Projection
from gazelle.engine.scratch import Scratch
from gazelle.kernels.matmul import times


def make_projection(parts: Sequence[Linear], scratch: Scratch, slot: int, dtype: torch.dtype,
                    precision: str) -> Projection:
    """Linears with one input, as their device computes them best."""
    if parts[0].weight.device.type == "cpu":
        return CpuProjection(parts, scratch, slot, dtype)
    return fp8.make_projection(parts, scratch, slot, dtype, precision)


class CpuProjection(Projection):
    """`Bordered.whole` is [[W], [A]] [N + R, K] here, and `Bordered.b` [N, 0]."""

    def input(self, T: int) -> Tensor:
        """An empty [T, K]."""
        return torch.empty(T, self.K, dtype=self.dtype, device=self.device)

    def enter(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def matrix_shape(self) -> tuple[int, int]:
        """Of [[W], [A]]."""
        return self.N + self.R, self.K

    def _fill_border(self, a: Tensor, b: Tensor) -> None:
        for part, (_, columns) in zip(self.parts, self.spans, strict=True):
            if part.adapter is not None:
                a[columns].copy_(part.adapter.a.detach())

    def forward(self, x: Tensor, W: Bordered, out: Tensor | None = None, residual: Tensor | None = None,
                seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Projection.forward`, for x [T, K]."""
        z = self._down(x, W.a, seed) if self.R else None
        if residual is not None and z is not None and len(self.parts) == 1 and self.parts[0].bias is None:
            y = times(x, W.whole[: self.N], torch.addmm(residual, z, self._factor(self.parts[0]).t()), out)
        else:
            y = times(x, W.whole[: self.N], residual, out)
            self._finish(y, z)
        return y, z

    def forward_wide(self, x: Tensor, W: Bordered, seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Projection.forward_wide`, z and y in one product."""
        wide = times(x, W.whole)
        z = None
        if self.R:
            # A copy, since the backward pass writes dz into its place.
            z = self._down(x, W.a, seed) if seed is not None and self.has_dropout else wide[:, self.N :].clone()
        self._finish(wide[:, : self.N], z)
        return wide, z

    def _finish(self, y: Tensor, z: Tensor | None) -> None:
        """Add the adapters' part and the biases."""
        for part, (rows, columns) in zip(self.parts, self.spans, strict=True):
            if part.adapter is not None and z is not None:
                y[:, rows].addmm_(z[:, columns], self._factor(part).t())
            if part.bias is not None:
                y[:, rows] += part.bias.detach().to(y.dtype)

    def _factor(self, part: Linear) -> Tensor:
        """The adapter's sB [n, r] in the type of computation."""
        adapter: Any = part.adapter
        b = adapter.b.detach()
        return (b if adapter.scale == 1 else b * adapter.scale).to(self.dtype)

    def _up_gradient(self, dy: Tensor, W: Bordered, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(dy.shape[0], self.R, dtype=dy.dtype, device=dy.device)
        for part, (rows, columns) in zip(self.parts, self.spans, strict=True):
            if part.adapter is not None:
                torch.mm(dy[:, rows], self._factor(part), out=out[:, columns])
        return out

    def _input_product(self, dy: Tensor, W: Bordered) -> Tensor:
        return times(dy, W.whole.t())
