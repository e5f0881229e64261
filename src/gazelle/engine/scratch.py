"""Memory for matrices that live only until the next one is made: dequantised weights, one projection at a time."""

import torch
from torch import Tensor


class Scratch:
    """One buffer a device and type, grown to the largest matrix asked for, shared by all layers of a model."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, slot: int = 0) -> Tensor:
        """[rows, columns], its content undefined. The last one from the same slot is overwritten with it."""
        key = (device, dtype, slot)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(key, None)
            buffer = self._buffers[key] = torch.empty(rows * columns, dtype=dtype, device=device)
        return buffer[: rows * columns].view(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
