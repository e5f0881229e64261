"""Linear layers that share their input, with their adapters, run as one matrix product.

For frozen weights W with factors A and B and scale s, the bordered matrix W̃ = [[W, sB], [A, 0]] makes LoRA
(https://arxiv.org/abs/2106.09685) R more columns instead of another pass over the output:
y = [x, xAᵀ]·[W, sB]ᵀ, and dx = [dy, s·dyB]·[[W], [A]].

Shapes: T tokens, N outputs and K inputs of all parts together, R adapter columns of all parts together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gazelle.engine.dropout import dropped
from gazelle.engine.scratch import Scratch
from gazelle.kernels.border import fill_borders
from gazelle.kernels.factors import MOST_PARTS, NO_SUMS, Factors, Normed, Sums, add_factor_gradients
from gazelle.quantize.storage import Dense, Storage

# Adapter columns are padded to this many: rows of 16-bit matrices that begin on 128-byte boundaries multiply faster.
_ALIGN = {"cuda": 64}
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapter:
    """LoRA factors: the linear's output grows by scale · dropout(x) · aᵀ · bᵀ. a [r, K], b [N, r]."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Linear:
    """One linear layer: its weight [N, K], bias [N] and adapter. A `Dense` weight may be trainable."""

    weight: Storage
    bias: Tensor | None = None
    adapter: Adapter | None = None

    @property
    def trainable_weight(self) -> Tensor | None:
        """The weight itself if it is trained."""
        return self.weight.weight if isinstance(self.weight, Dense) and self.weight.weight.requires_grad else None


@dataclass(frozen=True)
class Bordered:
    """W̃ [N + R, K + R] and its parts: `a` [R, K] and `b` [N, R], the adapters' factors in the type of computation."""

    whole: Tensor
    a: Tensor
    b: Tensor


class Gradients:
    """Gradients of one layer's backward pass, gathered by parameter, which may contribute more than once.

    Args:
        wanted: what is trained.
        in_place: adapters' gradients are added to the `.grad` of their parameters, past autograd.
    """

    def __init__(self, wanted: Sequence[Tensor], *, in_place: bool = False) -> None:
        self.wanted = {id(tensor) for tensor in wanted}
        self.in_place = in_place
        self.by_id: dict[int, Tensor] = {}

    def wants(self, parameter: Tensor | None) -> bool:
        """True if `parameter` is trained."""
        return parameter is not None and id(parameter) in self.wanted

    def add(self, parameter: Tensor, grad: Tensor) -> None:
        """Add to the gradient of `parameter`."""
        held = self.by_id.get(id(parameter))
        self.by_id[id(parameter)] = grad if held is None else held.add_(grad)

    def of(self, parameter: Tensor) -> Tensor | None:
        """What was gathered for `parameter`, in its type."""
        grad = self.by_id.get(id(parameter))
        return None if grad is None else grad.to(parameter.dtype)


class Projection:
    """Linears with one input. Dense frozen weights are laid side by side once; quantised ones are, at each use."""

    def __init__(self, parts: Sequence[Linear], scratch: Scratch, slot: int, dtype: torch.dtype) -> None:
        self.parts, self.scratch, self.slot, self.dtype = tuple(parts), scratch, slot, dtype
        self.N, self.K = sum(part.weight.shape[0] for part in parts), parts[0].weight.shape[1]
        ranks = [0 if part.adapter is None else part.adapter.a.shape[0] for part in parts]
        self.device = parts[0].weight.device
        align = _ALIGN.get(self.device.type, 1)
        self.R = -(-sum(ranks) // align) * align
        self.spans: list[tuple[slice, slice]] = []  # rows of N and columns of R that belong to each part
        row = column = 0
        for part, rank in zip(parts, ranks, strict=True):
            rows = part.weight.shape[0]
            self.spans.append((slice(row, row + rows), slice(column, column + rank)))
            row, column = row + rows, column + rank
        self.has_dropout = any(part.adapter is not None and part.adapter.dropout > 0 for part in parts)
        self.kept: Tensor | None = None
        if all(isinstance(part.weight, Dense) and part.weight.dtype == dtype for part in parts):
            self.kept = self._lay_side_by_side()

    @property
    def trains_weights(self) -> bool:
        """True if not only adapters and biases are trained."""
        return any(part.trainable_weight is not None for part in self.parts)

    def trainable(self) -> Iterator[Tensor]:
        """Every trained tensor of the parts."""
        for part in self.parts:
            candidates = [part.trainable_weight, part.bias]
            if part.adapter is not None:
                candidates += [part.adapter.a, part.adapter.b]
            yield from (tensor for tensor in candidates if tensor is not None and tensor.requires_grad)

    def input(self, T: int) -> Tensor:
        """An empty [T, K + R] whose first K columns are for the input."""
        return torch.empty(T, self.K + self.R, dtype=self.dtype, device=self.device)

    def output(self, T: int) -> Tensor:
        """An empty [T, N + R] whose first N columns are for the output, or for its gradient."""
        return torch.empty(T, self.N + self.R, dtype=self.dtype, device=self.device)

    def enter(self, x: Tensor) -> Tensor:
        """`input` with x [T, K] in it."""
        entry = self.input(x.shape[0])
        entry[:, : self.K].copy_(x)
        return entry

    def matrix(self, again: bool = False) -> Bordered:
        """W̃ with the adapters as they are now. For quantised weights it lies in scratch memory, where it stays until
        another projection with the same slot needs it.

        Args:
            again: the adapters are what they were at the last call, as in a backward pass.
        """
        matrix = self.kept
        if matrix is None:
            matrix = self.scratch.matrix(*self.matrix_shape(), self.dtype, self.device, self.slot)
            for part, (rows, _) in zip(self.parts, self.spans, strict=True):
                part.weight.write(matrix[rows, : self.K])
        a, b = matrix[self.N :, : self.K], matrix[: self.N, self.K :]
        if not (again and matrix is self.kept):
            self._fill_border(a, b)
        return Bordered(matrix, a, b)

    def matrix_shape(self) -> tuple[int, int]:
        """Of W̃."""
        return self.N + self.R, self.K + self.R

    def _fill_border(self, a: Tensor, b: Tensor) -> None:
        """The adapters as they are now: a [R, K] and b [N, R]."""
        fillings = []
        for part, (rows, columns) in zip(self.parts, self.spans, strict=True):
            if (adapter := part.adapter) is not None:
                fillings.append(Factors(adapter.a.detach(), adapter.b.detach(), adapter.scale, rows, columns))
            elif self.R:
                b[rows].zero_()
        if fillings:
            fill_borders(a, b, fillings)

    def forward(self, x: Tensor, W: Bordered, out: Tensor | None = None, residual: Tensor | None = None,
                seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y [T, N] and z [T, R].

        Args:
            x: [T, K + R] from `input`, its first K columns filled. The rest is filled here.
            W: from `matrix`.
            out: [T, N] view to write to.
            residual: [T, N] that is added to y.
            seed: of dropout, which is left out without one.
        """
        z = self._down(x[:, : self.K], W.a, seed) if self.R else None
        if z is not None:
            x[:, self.K :].copy_(z)
        y = self._product(x, W, out, residual)
        for part, (rows, _) in zip(self.parts, self.spans, strict=True):
            if part.bias is not None:
                y[:, rows] += part.bias.detach().to(y.dtype)
        return y, z

    def forward_wide(self, x: Tensor, W: Bordered, seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`output` with y in it, and z."""
        wide = self.output(x.shape[0])
        _, z = self.forward(x, W, out=wide[:, : self.N], seed=seed)
        return wide, z

    def _down(self, x: Tensor, A: Tensor, seed: Tensor | None) -> Tensor:
        """z [T, R] = xAᵀ."""
        if seed is None or not self.has_dropout:
            return x @ A.t()
        z = torch.zeros(x.shape[0], self.R, dtype=x.dtype, device=x.device)
        for number, columns, rate in self._adapters():
            z[:, columns] = dropped(x, rate, seed, number) @ A[columns].t()
        return z

    def input_gradient(self, dy: Tensor, W: Bordered, seed: Tensor | None = None) -> Tensor:
        """dx [T, K].

        Args:
            dy: [T, N + R], its first N columns the gradient of y. The rest is filled here.
            W, seed: as in `forward`.
        """
        if not self.R:
            return self._input_product(dy, W)
        if seed is None or not self.has_dropout:
            self._up_gradient(dy, W, out=dy[:, self.N :])
            return self._input_product(dy, W)
        dz = self._up_gradient(dy, W)
        dy[:, self.N :].zero_()
        dx = self._input_product(dy, W)
        dy[:, self.N :].copy_(dz)
        for number, columns, rate in self._adapters():
            dx += dropped(dz[:, columns] @ W.a[columns], rate, seed, number)
        return dx

    def _up_gradient(self, dy: Tensor, W: Bordered, out: Tensor | None = None) -> Tensor:
        """dz [T, R] = s·dyB."""
        return torch.mm(dy[:, : self.N], W.b, out=out)

    def _product(self, x: Tensor, W: Bordered, out: Tensor | None, residual: Tensor | None) -> Tensor:
        """[x, z]·[W, sB]ᵀ, plus the residual."""
        weight = W.whole[: self.N].t()
        return torch.mm(x, weight, out=out) if residual is None else torch.addmm(residual, x, weight, out=out)

    def _input_product(self, dy: Tensor, W: Bordered) -> Tensor:
        """[dy, dz]·[[W], [A]]."""
        return dy @ W.whole[:, : self.K]

    def parameter_gradients(self, dy: Tensor, x: Tensor | Normed | None, W: Bordered, z: Tensor | None,
                            grads: Gradients, seed: Tensor | None = None, sums: Sums = NO_SUMS) -> None:
        """Gradients of what is trained, added to `grads`.

        Args:
            dy: [T, N + R] as `input_gradient` left it.
            x: [T, K], the input; None if `sums.a` is there.
            W, seed: as in `forward`.
            z: [T, R] from `forward`, or None to compute it again.
            grads: where they go.
            sums: what is summed up already, if `targets` gave any.
        """
        inner, dz = dy[:, : self.N], dy[:, self.N :]
        targets = self.targets(grads, seed)
        if isinstance(x, Normed) and (targets is None or self.trains_weights):
            x = x.made()
        if isinstance(x, Tensor):
            self._weight_gradients(inner, x, grads)
        self._bias_gradients(inner, grads)
        if not self.R:
            return
        if z is None and x is not None:
            z = self._down(x if isinstance(x, Tensor) else x.made(), W.a, seed)
        if targets and z is not None:
            add_factor_gradients(inner, x, z, dz, targets, sums)
        elif isinstance(x, Tensor) and z is not None:
            self._factor_gradients(inner, x, z, dz, grads, seed)

    @property
    def has_kernel(self) -> bool:
        """True if a kernel can add the gradients of all adapters where they are gathered."""
        return self.device.type != "cpu" and self.dtype in _HALVES and len(self.parts) <= MOST_PARTS

    def targets(self, grads: Gradients, seed: Tensor | None = None) -> list[Factors] | None:
        """Where the gradients of all adapters are gathered, if they are to be added there by a kernel."""
        if not grads.in_place or not self.has_kernel or (seed is not None and self.has_dropout):
            return None
        found = []
        for part, (rows, columns) in zip(self.parts, self.spans, strict=True):
            if (adapter := part.adapter) is None:
                continue
            a, b = adapter.a.grad, adapter.b.grad
            if a is None or b is None or not (grads.wants(adapter.a) and grads.wants(adapter.b)):
                return None
            found.append(Factors(a, b, adapter.scale, rows, columns))
        return found

    def _factor_gradients(self, dy: Tensor, x: Tensor, z: Tensor, dz: Tensor, grads: Gradients,
                          seed: Tensor | None) -> None:
        together = product(dz.t(), x) if seed is None or not self.has_dropout else None
        for number, (part, (rows, columns)) in enumerate(zip(self.parts, self.spans, strict=True)):
            if (adapter := part.adapter) is None:
                continue
            if grads.wants(adapter.a):
                if together is not None:
                    grads.add(adapter.a, together[columns])
                elif seed is not None:
                    grads.add(adapter.a, product(dz[:, columns].t(), dropped(x, adapter.dropout, seed, number)))
            if grads.wants(adapter.b):
                dB = product(dy[:, rows].t(), z[:, columns])
                grads.add(adapter.b, dB if adapter.scale == 1 else dB.mul_(adapter.scale))

    def _adapters(self) -> Iterator[tuple[int, slice, float]]:
        """(number, columns, dropout) of each part with an adapter."""
        for number, (part, (_, columns)) in enumerate(zip(self.parts, self.spans, strict=True)):
            if part.adapter is not None:
                yield number, columns, part.adapter.dropout

    def _bias_gradients(self, dy: Tensor, grads: Gradients) -> None:
        for part, (rows, _) in zip(self.parts, self.spans, strict=True):
            if part.bias is not None and grads.wants(part.bias):
                grads.add(part.bias, dy[:, rows].sum(0, dtype=accumulator(dy)))

    def _weight_gradients(self, dy: Tensor, x: Tensor, grads: Gradients) -> None:
        if all(grads.wants(part.trainable_weight) for part in self.parts):
            dW = dy.t() @ x
            for part, (rows, _) in zip(self.parts, self.spans, strict=True):
                grads.add(part.weight.weight, dW[rows])  # type: ignore[attr-defined]
            return
        for part, (rows, _) in zip(self.parts, self.spans, strict=True):
            if (weight := part.trainable_weight) is not None and grads.wants(weight):
                grads.add(weight, dy[:, rows].t() @ x)

    def _lay_side_by_side(self) -> Tensor:
        """The weights in one bordered matrix; each part's tensor becomes a view of its rows there."""
        sample: Any = self.parts[0].weight
        with torch.no_grad():
            matrix = torch.zeros(self.matrix_shape(), dtype=sample.dtype, device=self.device)
            for part, (rows, _) in zip(self.parts, self.spans, strict=True):
                weight: Tensor = part.weight.weight  # type: ignore[attr-defined]
                matrix[rows, : self.K].copy_(weight)
                weight.data = matrix[rows, : self.K]
        return matrix


def accumulator(x: Tensor) -> torch.dtype:
    """The type in which gradients of parameters are summed."""
    return torch.promote_types(x.dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 for 16-bit factors: what is rounded once to 16 bits cannot be summed exactly any more."""
    if a.is_cuda and a.dtype in _HALVES:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
