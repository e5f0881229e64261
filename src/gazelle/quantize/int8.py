"""bitsandbytes' 8-bit weights as a storage (https://arxiv.org/abs/2208.07339). Shapes: N outputs, K inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gazelle.kernels import int8
from gazelle.kernels.fp8 import scale_of


@dataclass(frozen=True, eq=False)
class Int8:
    """The tensors of a `Linear8bitLt`, shared with it and never copied: `weight` [N, K] int8, `row_absmax` [N]."""

    weight: Tensor
    row_absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """bitsandbytes quantises from no other."""
        return torch.float16

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.weight.nbytes + self.row_absmax.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of."""
        return {"weight": self.weight, "row_absmax": self.row_absmax}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Int8":
        """The same with others in the place of `tensors()`."""
        return Int8(tensors["weight"], tensors["row_absmax"])

    def write(self, out: Tensor) -> Tensor:
        """Its numbers, in `out` [N, K], bit-equal to what bitsandbytes makes of them."""
        return int8.dequantize(self.weight, self.row_absmax, out)

    def row_scales(self) -> Tensor:
        """[N] float32: rows divided by them fit in e4m3. The largest of a row is ±127 as bitsandbytes quantises."""
        return scale_of(self.row_absmax)

    def write_fp8(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """Its rows divided by `row_scales`, in `out` [N, K] of e4m3."""
        return int8.dequantize(self.weight, self.row_absmax, out, row_scales)

    def write_fp8_transposed(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """The same as [K, N]."""
        return int8.dequantize_transposed(self.weight, self.row_absmax, out, row_scales)
