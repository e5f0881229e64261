"""How rows lie in T tokens, and the two ways between tokens and batches of rows.

Shapes: T tokens, R rows, L longest row, H heads, D head size.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that lie end to end in T tokens: made once a batch and handed to every layer.

    What backends derive from it (padding, block masks) is kept on it and made again if `cu_seqlens` is changed in
    place. A CUDA graph needs Rows of its own, made for the tensors that the graph reads.

    Attributes:
        count: R.
        max_length: at least L, in tokens.
        uniform: every row has exactly `max_length` tokens; `cu_seqlens` is not needed then.
        cu_seqlens: [R + 1] int32 on the device: where each row begins, and T. Empty rows are allowed.
        sizes: the R lengths on the host, if they are known; a CPU goes by them.
        mask: [R or 1, 1, L, L] for uniform rows, in place of causality: True where a query may look, or what is added
            to the scores. A query that may look nowhere looks at itself.
    """

    count: int
    max_length: int
    uniform: bool = False
    cu_seqlens: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    mask: Tensor | None = None
    _made: dict[Hashable, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.uniform and self.cu_seqlens is None and self.sizes is None:
            raise ValueError("rows of different lengths need cu_seqlens or sizes")
        if self.mask is not None and not self.uniform:
            raise ValueError("a mask needs uniform rows")

    def once(self, name: Hashable, device: torch.device, make: Callable[[], Made]) -> Made:
        """What `make` gives, remembered under `name` for the layers to come."""
        # What a graph under capture reads must be made inside it, or a replay would see an earlier batch's.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        version = tuple(x._version for x in (self.cu_seqlens, self.mask) if x is not None and not x.is_inference())
        found = self._made.get((name, capturing))
        if found is None or found[0] != version:
            with torch.no_grad():
                found = self._made[name, capturing] = (version, make())
        return found[1]

    def starts(self, device: torch.device) -> Tensor:
        """[R + 1] int32: where each row begins, and T."""
        return self.once(("starts", device), device, lambda: self._starts(device))

    def _starts(self, device: torch.device) -> Tensor:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.to(device, torch.int32)
        if self.uniform:
            return torch.arange(self.count + 1, dtype=torch.int32, device=device) * self.max_length
        return torch.tensor((0, *(self.sizes or ())), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

    def row_of(self, tokens: int, device: torch.device) -> Tensor:
        """[T] int32: the row of each token."""
        position = torch.arange(tokens, dtype=torch.int32, device=device)
        # From the right: past all rows that begin here, which leaves out the empty ones.
        return torch.searchsorted(self.starts(device)[1:], position, right=True, out_int32=True)

    def host_sizes(self, tokens: int) -> tuple[int, ...]:
        """The R lengths. Waits for the device if `sizes` was not given.

        Raises:
            ValueError: they do not add up to the number of tokens.
        """
        cpu = torch.device("cpu")
        sizes = self.sizes
        if sizes is None:
            sizes = self.once("sizes", cpu, lambda: tuple(self.starts(cpu).diff().tolist()))
        if sum(sizes) != tokens:
            raise ValueError(f"cu_seqlens describes {sum(sizes)} tokens, but there are {tokens}")
        return sizes


class Padding(NamedTuple):
    """Where tokens go in a padded batch: `slots` [R·L] takes tokens there, `tokens` [T] takes them back."""

    slots: Tensor
    tokens: Tensor


def _padding(rows: Rows, tokens: int, device: torch.device) -> Padding:
    starts, L = rows.starts(device).long(), rows.max_length
    slots = (starts[:-1, None] + torch.arange(L, device=device)).clamp_(max=tokens - 1).flatten()
    row = rows.row_of(tokens, device).long()
    return Padding(slots, row * L + torch.arange(tokens, device=device) - starts[row])


def to_batch(x: Tensor, rows: Rows) -> Tensor:
    """[T, h, D] -> [R, h, L, D]: a view of uniform rows, else padded on the right with tokens that nothing may read.

    Padding lies behind every real token of its row, so causality alone hides it.
    """
    if rows.uniform:
        return x.unflatten(0, (rows.count, rows.max_length)).transpose(1, 2)
    padding = rows.once("padding", x.device, lambda: _padding(rows, x.shape[0], x.device))
    padded: Tensor = _Pad.apply(x, padding)
    return padded.unflatten(0, (rows.count, rows.max_length)).transpose(1, 2)


def from_batch(x: Tensor, rows: Rows, tokens: int) -> Tensor:
    """[R, h, L, D] -> [T, h, D]."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if rows.uniform:
        return flat
    return _Unpad.apply(flat, rows.once("padding", x.device, lambda: _padding(rows, tokens, x.device)))


class _Pad(torch.autograd.Function):
    """[T, h, D] -> [R·L, h, D]. Padding slots hold other tokens; nothing reads them, so their gradient is zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding  # type: ignore[attr-defined]
        return x.index_select(0, padding.slots)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.padding.tokens), None  # type: ignore[attr-defined]


class _Unpad(torch.autograd.Function):
    """[R·L, h, D] -> [T, h, D]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding  # type: ignore[attr-defined]
        return x.index_select(0, padding.tokens)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        padding: Padding = ctx.padding  # type: ignore[attr-defined]
        padded = grad.new_zeros(len(padding.slots), *grad.shape[1:])
        return padded.index_copy_(0, padding.tokens, grad), None
