"""Frozen weights that lie in pinned host memory and come to the device one layer ahead of the computation.

Two buffers take turns: while a layer computes from one, the next layer's weights are copied into the other. A layer
always uses the same buffer, so its projections read from fixed places.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gazelle.engine.linear import Projection

BUFFERS = 2
_ALIGN = 512  # bytes between the beginnings of two tensors in a buffer


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a part's weight lies in its layer's buffer."""

    projection: Projection
    part: int
    name: str
    start: int
    sample: Tensor  # on the meta device: shape and type


class WeightStream:
    """The weights of some layers of a model, streamed.

    Args:
        layers: the projections of each layer, in the order of the forward pass. They read from the buffers from now
            on, and the tensors that they read from before may be freed.
    """

    def __init__(self, layers: list[tuple[Projection, ...]]) -> None:
        self.device = layers[0][0].device
        cuda = self.device.type == "cuda"
        placed = [_places(projections) for projections in layers]
        sizes = [places[-1].start + places[-1].sample.nbytes for places in placed]
        self.hosts: list[Tensor] = []
        for places, size in zip(placed, sizes, strict=True):
            host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
            for place in places:
                source = place.projection.parts[place.part].weight.tensors()[place.name]
                _view(host, place).copy_(source.detach())
            self.hosts.append(host)
        self._placed = placed
        self._buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        self._holds: list[int | None] = [None] * BUFFERS
        self._arrived: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._side = torch.cuda.Stream(self.device) if cuda else None
        for number, places in enumerate(placed):
            self._point(places, self._buffers[number % BUFFERS])

    def arrive(self, number: int, *, forward: bool) -> None:
        """Layer `number` of the stream is about to compute; the one after it in this direction is sent for."""
        self._load(number)
        if (done := self._arrived[number % BUFFERS]) is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        following = number + (1 if forward else -1)
        if 0 <= following < len(self.hosts):
            self._load(following)

    def host_tensors(self, number: int) -> list[Tensor]:
        """The tensors of a layer's weights in host memory: projection by projection, part by part."""
        return [_view(self.hosts[number], place) for place in self._placed[number]]

    def _load(self, number: int) -> None:
        slot, host = number % BUFFERS, self.hosts[number]
        if self._holds[slot] == number:
            return
        self._holds[slot] = number
        if self._side is None:
            self._buffers[slot][: len(host)].copy_(host)
            return
        # What read this buffer last has been launched by now: the copy waits until it is done.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self._buffers[slot][: len(host)].copy_(host, non_blocking=True)
            self._arrived[slot] = self._side.record_event()

    @staticmethod
    def _point(places: list[_Place], buffer: Tensor) -> None:
        """Let the projections of a layer read their weights from a buffer."""
        views: dict[tuple[int, int], dict[str, Tensor]] = {}
        projections = {id(place.projection): place.projection for place in places}
        for place in places:
            views.setdefault((id(place.projection), place.part), {})[place.name] = _view(buffer, place)
        for key, projection in projections.items():
            projection.parts = tuple(
                replace(part, weight=part.weight.with_tensors(views[key, number]))
                for number, part in enumerate(projection.parts))
            projection.kept = None


def _places(projections: tuple[Projection, ...]) -> list[_Place]:
    found, at = [], 0
    for projection in projections:
        for number, part in enumerate(projection.parts):
            for name, tensor in part.weight.tensors().items():
                sample = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                found.append(_Place(projection, number, name, at, sample))
                at += -(-sample.nbytes // _ALIGN) * _ALIGN
    return found


def _view(buffer: Tensor, place: _Place) -> Tensor:
    sample = place.sample
    return buffer[place.start : place.start + sample.nbytes].view(sample.dtype).view(sample.shape)
