"""Tensors parked in pinned host memory between forward and backward, copied beside the computation.

No tensor is handed to the allocator from another stream: what is being copied is held until the computing stream has
waited for the copy, so memory comes back at the same point of every step.
"""

import torch
from torch import Tensor

_DEPTH = 2  # copies under way at a time; the computing stream waits for older ones before their memory is used again


class Parked:
    """A tensor in host memory. On a CPU it simply stays where it is."""

    def __init__(self, host: Tensor, device: torch.device, garage: "Garage | None") -> None:
        self._host, self._device, self._garage = host, device, garage
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

    def get(self) -> Tensor:
        """The tensor, on its device."""
        if self._garage is None:
            return self._host
        if self._fetched is None:
            self.fetch()
            return self.get()
        tensor, done = self._fetched
        torch.cuda.current_stream(self._device).wait_event(done)
        self._garage.take_back(self._host)
        self._fetched = None
        return tensor


class Garage:
    """Pinned buffers, used again step after step, and the stream that copies to and from them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []

    def park(self, tensor: Tensor) -> Parked:
        """Begin to copy a tensor to the host; its memory is free for others once that is done."""
        shelf = self._free.get((tensor.shape, tensor.dtype))
        host = shelf.pop() if shelf else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, self.stream.record_event()))
        while len(self._leaving) > _DEPTH:
            _, done = self._leaving.pop(0)
            computing.wait_event(done)
        return Parked(host, tensor.device, self)

    def settle(self) -> None:
        """Let go of everything that is being copied."""
        computing = torch.cuda.current_stream(self.device)
        for _, done in self._leaving:
            computing.wait_event(done)
        self._leaving.clear()

    def take_back(self, host: Tensor) -> None:
        """A buffer whose content has been fetched. The same stream fills it next, so that cannot be too early."""
        self._free.setdefault((host.shape, host.dtype), []).append(host)


_garages: dict[torch.device, Garage] = {}


def park(tensor: Tensor) -> Parked:
    """A tensor moved to pinned host memory if it lies on a GPU."""
    if not tensor.is_cuda:
        return Parked(tensor, tensor.device, None)
    if tensor.device not in _garages:
        _garages[tensor.device] = Garage(tensor.device)
    return _garages[tensor.device].park(tensor)


def settle(device: torch.device) -> None:
    """Let go of what is still being copied from a device: the backward pass begins."""
    if device in _garages:
        _garages[device].settle()
