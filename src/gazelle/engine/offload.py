"""Tensors parked in pinned host memory between forward and backward, copied beside the computation.

No tensor is handed to the allocator from another stream: what is being copied is held until the computing stream has
waited for the copy, so memory comes back at the same point of every step.
"""

import torch
from torch import Tensor


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
        self._leaving: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None

    def park(self, tensors: tuple[Tensor, ...]) -> list[Parked]:
        """Begin to copy tensors to the host, and let go of those before: these had the time of a layer to leave."""
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)
        hosts = [self._host(tensor) for tensor in tensors]
        with torch.cuda.stream(self.stream):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            leaving = tensors, self.stream.record_event()
        self.settle()
        self._leaving = leaving
        return [Parked(host, self.device, self) for host in hosts]

    def _host(self, tensor: Tensor) -> Tensor:
        shelf = self._free.get((tensor.shape, tensor.dtype))
        return shelf.pop() if shelf else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def settle(self) -> None:
        """Let go of what is being copied."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def take_back(self, host: Tensor) -> None:
        """A buffer whose content has been fetched. The same stream fills it next, so that cannot be too early."""
        self._free.setdefault((host.shape, host.dtype), []).append(host)


_garages: dict[torch.device, Garage] = {}


def park(*tensors: Tensor) -> list[Parked]:
    """Contiguous tensors moved to pinned host memory if they lie on a GPU: what a layer parks, all at once."""
    device = tensors[0].device
    if device.type != "cuda":
        return [Parked(tensor, device, None) for tensor in tensors]
    if device not in _garages:
        _garages[device] = Garage(device)
    return _garages[device].park(tensors)


def settle(device: torch.device) -> None:
    """Let go of what is still being copied from a device: the backward pass begins."""
    if device in _garages:
        _garages[device].settle()
