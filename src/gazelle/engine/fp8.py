"""Projections whose frozen weights are multiplied in fp8: e4m3 with a scale a row (https://arxiv.org/abs/2209.05433).

Forward, rows of x and of W carry their scales. Backward, the scales of W's rows are folded into dy before it is
quantised, so the product over N needs none. Adapters stay in 16 bits and are added to the product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gazelle.base.errors import OptionError
from gazelle.engine.linear import Bordered, Linear, Projection
from gazelle.engine.scratch import Scratch
from gazelle.kernels.fp8 import fp8_supported, quantize_rows, scaled_mm
from gazelle.kernels.low_rank import add_low_rank


def check_fp8(device: torch.device) -> None:
    """Raise `OptionError` if a device has no fp8 products with a scale a row."""
    if not fp8_supported(device):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise OptionError("this device cannot compute in fp8", where="precision", found=found,
                          expected="an NVIDIA GPU, Ada or newer (compute capability 8.9)",
                          fix='leave out precision="fp8"')


def fits_fp8(parts: Sequence[Linear]) -> bool:
    """True for frozen weights whose sides are multiples of 16, as fp8 products want them."""
    return all(part.trainable_weight is None and all(side % 16 == 0 for side in part.weight.shape) for part in parts)


@dataclass(frozen=True)
class Fp8Bordered(Bordered):
    """The adapters' factors; the weights are written in fp8 where they are used. `whole` is empty."""

    scales: Tensor  # [N] float32, of the weight's rows


class Fp8Projection(Projection):
    """A `Projection` of frozen weights that computes in fp8."""

    _scales: Tensor | None = None
    _ones: Tensor

    def matrix(self, again: bool = False) -> Bordered:
        """The adapters as they are now, and the scales of the weights."""
        if self._scales is None:
            self._scales = torch.cat([part.weight.row_scales() for part in self.parts])
            self._ones = torch.ones(self.K, device=self.device)
        a = torch.empty(self.R, self.K, dtype=self.dtype, device=self.device)
        b = torch.empty(self.N, self.R, dtype=self.dtype, device=self.device)
        self._fill_border(a, b)
        return Fp8Bordered(a.new_empty(0), a, b, self._scales)

    def _product(self, x: Tensor, W: Any, out: Tensor | None, residual: Tensor | None) -> Tensor:
        inner, scale = quantize_rows(x[:, : self.K])
        weight = self._eight_bits(self.N, self.K)
        for part, (rows, _) in zip(self.parts, self.spans, strict=True):
            part.weight.write_fp8(weight[rows], W.scales[rows])
        y = scaled_mm(inner, weight, scale, W.scales, self.dtype)
        if self.R:
            return add_low_rank(y, x[:, self.K :], W.b, residual, out)
        if residual is not None:
            y += residual
        return y if out is None else out.copy_(y)

    def _input_product(self, dy: Tensor, W: Any) -> Tensor:
        inner, scale = quantize_rows(dy[:, : self.N], W.scales)
        weight = self._eight_bits(self.K, self.N)
        for part, (rows, _) in zip(self.parts, self.spans, strict=True):
            part.weight.write_fp8_transposed(weight[:, rows], W.scales[rows])
        dx = scaled_mm(inner, weight, scale, self._ones, self.dtype)
        return add_low_rank(dx, dy[:, self.N :], W.a.t()) if self.R else dx

    def _eight_bits(self, rows: int, columns: int) -> Tensor:
        return self.scratch.matrix(rows, columns, torch.float8_e4m3fn, self.device, self.slot)


def make_projection(parts: Sequence[Linear], scratch: Scratch, slot: int, dtype: torch.dtype,
                    precision: str) -> Projection:
    """Linears with one input: in fp8 if `precision` says so and their sides allow it, else in `dtype`."""
    kind = Fp8Projection if precision == "fp8" and fits_fp8(parts) else Projection
    return kind(parts, scratch, slot, dtype)
