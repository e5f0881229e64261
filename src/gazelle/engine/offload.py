"""Tensors parked in pinned host memory between forward and backward, copied beside the computation.

No tensor is handed to the allocator from another stream: what is being copied is held until the computing stream has
waited for the copy, so memory comes back at the same point of every step.
"""

import torch
from torch import Tensor


class Parked:
    """A tensor in host memory. On a CPU it simply stays where it is."""

    def __init__(self, host: Tensor, device: torch.device, garage: "Garage | None",
                 buffer: Tensor | None = None) -> None:
        self._host, self._device, self._garage, self._buffer = host, device, garage, buffer
        self._fetched: tuple[Tensor, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self._garage is None or self._fetched is not None:
            return
        side = self._garage.stream
        tensor = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            tensor.copy_(self._host, non_blocking=True)
            self._fetched = tensor, side.record_event()
        self._garage.arriving.append(self._fetched)

    def get(self) -> Tensor:
        """The tensor, on its device."""
        if self._garage is None:
            return self._host
        if self._fetched is None:
            self.fetch()
            return self.get()
        tensor, done = self._fetched
        self._garage.arriving = [one for one in self._garage.arriving if one is not self._fetched]
        torch.cuda.current_stream(self._device).wait_event(done)
        self._garage.take_back(self._buffer)
        self._fetched = None
        return tensor


class Garage:
    """Pinned buffers, used again step after step, and the stream that copies to and from them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._free: list[Tensor] = []  # bytes
        self._leaving: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None
        self.arriving: list[tuple[Tensor, torch.cuda.Event]] = []  # held here too, should nobody take them

    def park(self, tensors: tuple[Tensor, ...]) -> list[Parked]:
        """Begin to copy tensors to the host, and let go of those before: these had the time of a layer to leave."""
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)
        parked = []
        with torch.cuda.stream(self.stream):
            for tensor in tensors:
                buffer = self._buffer(tensor.nbytes)
                host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                host.copy_(tensor, non_blocking=True)
                parked.append(Parked(host, self.device, self, buffer))
            leaving = tensors, self.stream.record_event()
        self.settle()
        self._leaving = leaving
        self.abandon()
        return parked

    def _buffer(self, size: int) -> Tensor:
        """The smallest free buffer that is large enough: batches of many lengths share them."""
        fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= size]
        if not fitting:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))

    def settle(self) -> None:
        """Let go of what is being copied to the host."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def abandon(self) -> None:
        """Let go of what was sent for and never taken, as in a backward pass that ended with an error."""
        for _, done in self.arriving:
            torch.cuda.current_stream(self.device).wait_event(done)
        self.arriving.clear()

    def take_back(self, buffer: Tensor | None) -> None:
        """A buffer whose content has been fetched. The same stream fills it next, so that cannot be too early."""
        if buffer is not None:
            self._free.append(buffer)


_garages: dict[torch.device, Garage] = {}


def park(*tensors: Tensor) -> list[Parked]:
    """Contiguous tensors moved to pinned host memory if they lie on a GPU: what a layer parks, all at once."""
    device = tensors[0].device
    if device.type != "cuda":
        return [Parked(tensor, device, None) for tensor in tensors]
    if device not in _garages:
        _garages[device] = Garage(device)
    return _garages[device].park(tensors)


def empty() -> None:
    """Let go of all that is being copied, and of the memory on the host: a run has ended."""
    for garage in _garages.values():
        garage.settle()
        garage.abandon()
    _garages.clear()


def settle(device: torch.device) -> None:
    """Let go of what is still being copied from a device: the backward pass begins."""
    if device in _garages:
        _garages[device].settle()
