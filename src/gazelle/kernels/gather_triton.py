"""`kernels.gather` in Triton. A pinned tensor's address is valid on the GPU as well."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _gather(table, ids, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(ids + row).to(tl.int64)
    tl.store(out + row * width + column, tl.load(table + source * width + column, mask=inside), mask=inside)


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """See `kernels.gather.gather_rows`."""
    width = table.shape[1]
    out = torch.empty(len(ids), width, dtype=table.dtype, device=ids.device)
    _gather[(len(ids), triton.cdiv(width, _BLOCK))](table, ids, out, width, BLOCK=_BLOCK)
    return out
