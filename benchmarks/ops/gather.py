"""Rows of an embedding that lies in host memory, brought to where the ids are.

On a GPU: read over the bus by our kernel, or gathered on the host and copied, or, as a bound, from a table on the GPU.
GB/s count rows as read once and written once.
Alone: python -m benchmarks.ops.gather
"""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.ops._timing import DEVICE, DTYPE, ON_GPU, case, show
from torch import Tensor
from torch.nn import functional

from gazelle.kernels.gather import gather_rows

SHAPES = ((128256, 4096, 8192), (49152, 576, 8192)) if ON_GPU else ((49152, 576, 512),)  # words, width, tokens


def by_the_host(table: Tensor, ids: Tensor) -> Tensor:
    return table[ids.to(table.device)].to(ids.device)


def cases() -> Iterator[dict[str, Any]]:
    """{"op", "case", "ms", "gb_s"}."""
    for V, H, T in SHAPES:
        name, table = f"{T} of {V}x{H}", torch.zeros(V, H, dtype=DTYPE, pin_memory=ON_GPU)
        ids = torch.randint(V, (T,), device=DEVICE)
        size = 2 * T * H * DTYPE.itemsize
        yield case("gather", f"{name}, gazelle", size, gather_rows, table, ids)
        yield case("gather", f"{name}, eager", size, by_the_host, table, ids)
        here = table.to(DEVICE)
        yield case("gather", f"{name}, embedding beside the ids", size, functional.embedding, ids, here)
        del here


if __name__ == "__main__":
    show(cases())
