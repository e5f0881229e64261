"""The weights of one decoder layer, and what a pass through it is given."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gazelle.engine.dropout import new_seed
from gazelle.engine.keep import KEEP, Keep
from gazelle.engine.linear import Projection
from gazelle.engine.offload import settle
from gazelle.engine.spec import DecoderSpec
from gazelle.engine.stream import WeightStream
from gazelle.kernels.activation import MOST_RANKS
from gazelle.kernels.attention import Rows


@dataclass
class Norms:
    """Weights [H] of a layer's norms; those of queries and keys are [D]."""

    attention: Tensor
    mlp: Tensor
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None

    def all(self) -> Iterator[Tensor]:
        """Those that are there."""
        candidates = (self.attention, self.mlp, self.after_attention, self.after_mlp, self.query, self.key)
        return (weight for weight in candidates if weight is not None)


@dataclass
class Shared:
    """What the layers of one model share: a buffer [T, H + room] in which the gradient of the residual stream lies."""

    gradient: Tensor | None = None
    room: int = 0  # columns beside the stream's, for those of adapters
    in_place: bool = False  # adapters' gradients are added to buffers that stay where they are
    last: "weakref.ref[Any] | None" = None  # the pass made last, whose layer is the one below the next

    def begin(self, T: int, H: int, like: Tensor) -> Tensor:
        """A new buffer, of the type of `like` and on its device: a backward pass begins."""
        settle(like.device)
        self.gradient = torch.empty(T, H + self.room, dtype=like.dtype, device=like.device)
        return self.gradient


@dataclass
class Layer:
    """The weights of one layer. `keep` says what stays in memory between forward and backward."""

    spec: DecoderSpec
    norms: Norms
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    shared: Shared
    keep: Keep = KEEP
    stream: tuple[WeightStream, int] | None = None  # where its weights come from, and its number there
    trainable: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = [weight for weight in self.norms.all() if weight.requires_grad]
        for projection in self.projections:
            found.extend(projection.trainable())
        self.trainable = tuple(found)
        self.shared.room = max(self.shared.room, self.o.R, self.down.R)

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order of the forward pass."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def sum_columns(self) -> tuple[int, int] | None:
        """Adapter columns of down, and of the widest of gate and up, if these take sums made beside the activation."""
        ranks = [part.adapter.a.shape[0] for part in self.gate_up.parts if part.adapter is not None]
        columns, widest = self.down.spans[-1][1].stop, max(ranks, default=0)
        fits = columns and widest and max(columns, widest) <= MOST_RANKS and not self.down.trains_weights
        return (columns, widest) if fits else None

    def arrive(self, *, forward: bool) -> None:
        """Wait for its weights if they stream from host memory."""
        if self.stream is not None:
            stream, number = self.stream
            stream.arrive(number, forward=forward)

    def seeds(self, device: torch.device) -> list[Tensor] | None:
        """New seeds of the projections' dropout, or None if there is none."""
        if not any(projection.has_dropout for projection in self.projections):
            return None
        return [new_seed(device) for _ in self.projections]


@dataclass
class Call:
    """What a forward pass and its recomputation have in common."""

    rows: Rows
    cos: Tensor | None
    sin: Tensor | None
    training: bool
    seeds: list[Tensor] | None

    def seed(self, projection: int) -> Tensor | None:
        """The seed of a projection's dropout."""
        return None if self.seeds is None else self.seeds[projection]
