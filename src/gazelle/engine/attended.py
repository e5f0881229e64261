"""The attention half of a layer between its forward and its backward pass, here, in host memory, or in part made again.

Autograd saves views of a few large tensors for the backward pass of attention. It is made to remember where in these
they lie, so that they can leave, and come back as whole tensors with the same strides: kernels see what they would have
seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gazelle.engine.offload import Parked, park


class _Saved:
    """A tensor that autograd saved, or where it lies in one of those that left and are here again in `whole`."""

    def __init__(self, tensor: Tensor, whole: list[Tensor]) -> None:
        self.tensor: Tensor | None = tensor
        self._whole, self._number = whole, 0
        self._place = tensor.shape, tensor.stride(), tensor.storage_offset()

    def leave(self, number: int) -> None:
        self.tensor, self._number = None, number

    def give(self) -> Tensor:
        return self._whole[self._number].as_strided(*self._place) if self.tensor is None else self.tensor


class Remote:
    """One call of attention."""

    def __init__(self) -> None:
        # What autograd's graph holds on to must not hold on to the graph: no garbage collector sees through it.
        self._saved: list[_Saved] = []
        self._whole: list[Tensor] = []
        self._found: list[Tensor] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._edge: Any = None

    def __call__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend(q, k, v), once."""
        saved, whole = self._saved, self._whole

        def save(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor, whole))
            return saved[-1]

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, _Saved.give):
            out = attend(*_Inputs.apply(self._anchor, self._found, q, k, v))
        self._edge = torch.autograd.graph.get_gradient_edge(out)
        return out.detach()

    def leave(self, whole: Sequence[Tensor]) -> None:
        """Let go of `whole`, the tensors that q, k, v and the output are views of."""
        places = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(whole)}
        for saved in self._saved:
            if saved.tensor is not None and (place := saved.tensor.untyped_storage().data_ptr()) in places:
                saved.leave(places[place])

    def back(self, whole: Sequence[Tensor]) -> None:
        """`whole` is here again."""
        self._whole[:] = whole

    def gradients(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        torch.autograd.grad([self._edge], [self._anchor], [dout], allow_unused=True)
        dq, dk, dv = self._found
        self._found.clear()
        self._whole.clear()
        return dq, dk, dv


class _Inputs(torch.autograd.Function):
    """q, k and v as they are; their gradients are put into `found` instead of being handed on."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, found: list[Tensor], q: Tensor, k: Tensor,
                v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.found = found
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[None, ...]:
        ctx.found += (dq, dk, dv)
        return None, None, None, None, None


@dataclass
class Attended:
    """The attention half of a layer: what its backward pass reads."""

    z_qkv: Tensor | None
    rstd: Tensor  # of the norm before
    rstds: tuple[Tensor, Tensor] | None  # of the norms of queries and keys, if there are any
    whole: tuple[Tensor, ...]  # what q, k, v and out are views of, qkv before those norms first and out last
    call: Remote | tuple[Tensor, Tensor, Tensor]  # or q, k, v, which out hangs on
    z_o: Tensor | None = None
    branch: Tensor | None = None  # what o gave, if it is normalised before it is added
    away: list[Parked] = field(default_factory=list)

    @property
    def out(self) -> Tensor:
        return self.whole[-1]

    @property
    def has_qkv(self) -> bool:
        """False if queries, keys and values have to be made again."""
        return len(self.whole) > 1

    def gradients(self, dout: Tensor) -> tuple[Tensor, ...]:
        """dq, dk and dv from the gradient of out."""
        if isinstance(self.call, Remote):
            self.call.back(self.whole)
            return self.call.gradients(dout)
        return torch.autograd.grad(self.out, self.call, dout)

    def leave(self, x: Tensor, *, qkv: bool, host: bool) -> Tensor | Parked:
        """Let go of what is large: what is not kept, and with `host`, what waits there together with x.

        Args:
            x: the layer's input.
            qkv: queries, keys and values are kept.
            host: what is kept lies in host memory.

        Returns:
            x, or where it is.
        """
        if not isinstance(self.call, Remote):
            raise TypeError("attention that was not called to be sent away")
        self.call.leave(self.whole)
        self.whole = self.whole if qkv else self.whole[-1:]
        if not host:
            return x
        first, *self.away = park(x, *self.whole)
        self.whole, self.branch = (), None
        return first

    def fetch(self) -> None:
        """Begin to bring back what waits in host memory."""
        for parked in self.away:
            parked.fetch()

    def back(self) -> None:
        """Bring it back."""
        if self.away:
            self.whole, self.away = tuple(parked.get() for parked in self.away), []
