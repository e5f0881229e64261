"""Rows of a table in host memory, brought to the device where they are wanted.

Shapes: T rows asked for, V rows of the table, H columns.
"""

import torch
from torch import Tensor

from gazelle.kernels.dispatch import use_triton


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """table[ids] [T, H] on the device of `ids`.

    Args:
        table: [V, H] in host memory; pinned, if `ids` lie on a GPU, which then reads it over the bus without waiting
            for the host.
        ids: [T] integers below V.
    """
    if use_triton(ids):
        from gazelle.kernels import gather_triton

        return gather_triton.gather_rows(table, ids)
    return table.index_select(0, ids.to(table.device)).to(ids.device)


def pinned(table: Tensor) -> Tensor:
    """A copy of a table in host memory, pinned where there is a GPU."""
    return torch.empty(table.shape, dtype=table.dtype, pin_memory=table.is_cuda).copy_(table)
