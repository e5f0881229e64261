"""bitsandbytes' 4-bit weights as a storage (https://arxiv.org/abs/2305.14314). Shapes: N outputs, K inputs."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels import nf4
from gazelle.kernels.fp8 import scale_of


@dataclass(frozen=True, eq=False)
class NF4:
    """The tensors of a `Linear4bit` (nf4 or fp4), shared with it and never copied. See `kernels.nf4` for what they are.

    Once bitsandbytes has repacked a weight for a CPU, its layout is another, and this is a copy.
    """

    packed: Tensor
    code: Tensor
    absmax: Tensor
    nested: nf4.Nested | None
    block: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, packed: Tensor, state: Any) -> "NF4":
        """From a weight and its `QuantState`."""
        nested = None
        if state.nested:
            second = state.state2
            nested = nf4.Nested(second.code, second.absmax, state.offset, second.blocksize)
        N, K = state.shape
        # FSDP keeps the bytes under the name of another type.
        return cls(packed.flatten().view(torch.uint8), state.code, state.absmax, nested, state.blocksize, (N, K),
                   state.dtype)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What grows with the weight: the tables of 16 and 256 numbers stay where they are."""
        tensors = {"packed": self.packed, "absmax": self.absmax}
        return tensors if self.nested is None else tensors | {"nested_absmax": self.nested.absmax}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "NF4":
        """The same with others in the place of `tensors()`."""
        nested = self.nested and replace(self.nested, absmax=tensors["nested_absmax"])
        return replace(self, packed=tensors["packed"], absmax=tensors["absmax"], nested=nested)

    def write(self, out: Tensor) -> Tensor:
        """Its numbers, in `out` [N, K], bit-equal to what bitsandbytes makes of them."""
        return nf4.dequantize(self.packed, self.code, self.absmax, self.nested, self.block, out)

    def row_scales(self) -> Tensor:
        """[N] float32: rows divided by them fit in e4m3."""
        return scale_of(nf4.row_amax(self.absmax, self.nested, self.block, self.shape))

    def write_fp8(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """Its rows divided by `row_scales`, in `out` [N, K] of e4m3."""
        return nf4.dequantize(self.packed, self.code, self.absmax, self.nested, self.block, out, row_scales)

    def write_fp8_transposed(self, out: Tensor, row_scales: Tensor) -> Tensor:
        """The same as [K, N]."""
        return nf4.dequantize_transposed(self.packed, self.code, self.absmax, self.nested, self.block, out, row_scales)
