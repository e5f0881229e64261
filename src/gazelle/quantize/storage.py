"""How a frozen weight is kept, and how it is written back as numbers into a corner of a larger matrix.

Shapes: N outputs, K inputs.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gazelle.kernels.fp8 import divide_rows, divide_rows_transposed, scale_of
from gazelle.quantize.bnb import eight_bits, four_bits, is_four_bits, is_quantized_linear
from gazelle.quantize.int8 import Int8
from gazelle.quantize.nf4 import NF4

__all__ = ["NF4", "Dense", "Int8", "Storage", "storage_of"]


class Storage(Protocol):
    """A weight [N, K] in some form. Moving its module to another device or type makes it stale."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """What it was before it was quantised."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""

    def tensors(self) -> dict[str, Tensor]:
        """The large tensors it is made of."""

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Storage":
        """The same with others in the place of `tensors()`: same names, shapes and types."""

    def write(self, out: Tensor) -> Tensor:
        """Its numbers, in `out` [N, K]. Rows of `out` may lie apart, numbers of a row may not."""

    def row_scales(self) -> Tensor:
        """[N] float32, never 0: rows divided by them fit in e4m3."""

    def write_fp8(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """Its rows divided by `row_scales`, in `out` [N, K] of e4m3."""

    def write_fp8_transposed(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """The same as [K, N]."""


@dataclass(frozen=True, eq=False)
class Dense:
    """The weight itself, which may be trained."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.weight.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """See `Storage`."""
        return {"weight": self.weight}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Dense":
        """See `Storage`."""
        return Dense(tensors["weight"])

    def write(self, out: Tensor) -> Tensor:
        """See `Storage`."""
        return out.copy_(self.weight.detach())

    def row_scales(self) -> Tensor:
        """See `Storage`."""
        low, high = self.weight.detach().aminmax(dim=1)
        return scale_of(torch.maximum(-low, high))

    def write_fp8(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """See `Storage`."""
        return divide_rows(self.weight.detach(), row_scales, out)

    def write_fp8_transposed(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """See `Storage`."""
        return divide_rows_transposed(self.weight.detach(), row_scales, out)


def storage_of(module: Any) -> Storage:
    """The weight of `nn.Linear`, `Linear4bit` or `Linear8bitLt`, whose tensors it shares.

    Raises:
        ModelError: the layer's weight is not on a device yet, so it has not been quantised.
    """
    if not is_quantized_linear(module):
        return Dense(module.weight)
    return NF4.of(*four_bits(module)) if is_four_bits(module) else Int8(*eight_bits(module))
