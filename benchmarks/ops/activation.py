"""act(gate) · up of an MLP: forward, backward, and backward in place with the product beside it.

GB/s count what has to be read and written.
Alone: python -m benchmarks.ops.activation
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.ops._timing import ON_GPU, case, forward_and_backward, peers, random, show
from torch import Tensor
from torch.nn import functional

from gazelle.kernels.activation import gated, gated_backward

SHAPES = ((8192, 14336), (8192, 1536)) if ON_GPU else ((512, 1536),)  # tokens, intermediate


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def gelu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate) * up


EAGER: dict[str, tuple[Callable[..., Tensor], str]] = {
    "silu": (silu, "liger_swiglu"), "gelu_tanh": (gelu_tanh, "liger_geglu"), "gelu": (gelu, "")}


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for kind, (eager, liger) in EAGER.items():
        others = peers(eager, liger) if liger else {"eager": eager}
        for T, F in SHAPES[:1] if kind != "silu" else SHAPES:
            name, pair, dh, h = f"{T}x{F} {kind}", random(T, 2 * F), random(T, F), random(T, F)
            size = h.nbytes
            yield case("activation", f"{name} forward, gazelle", 3 * size, gated, pair, kind, h)
            yield case("activation", f"{name} backward, gazelle", 5 * size, gated_backward, pair, dh, kind,
                       torch.empty_like(pair))
            work = pair.clone()
            yield case("activation", f"{name} backward in place and the product, gazelle", 6 * size, gated_backward,
                       work, dh, kind, work, h)
            inputs = [x.contiguous().requires_grad_() for x in pair.chunk(2, 1)]
            yield from forward_and_backward("activation", name, others, inputs, (dh,), (3 * size, 5 * size))


if __name__ == "__main__":
    show(cases())
