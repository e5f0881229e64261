"""FlexAttention (https://arxiv.org/abs/2412.05496): the kernel for soft-caps, with windows and packed rows.

Shapes: T tokens, B blocks of BLOCK tokens.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gazelle.kernels.attention_dense import Scores
from gazelle.kernels.attention_rows import Rows, from_batch, to_batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
# One a shape, window and soft-cap. Past torch's own limit of 8 it would raise.
COMPILATIONS = 128


def flex(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scores: Scores) -> Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]. The first call for a shape compiles, which takes seconds."""
    if scores.dropout or rows.mask is not None:
        raise ValueError("flex attention knows no dropout or mask")
    length = rows.max_length if rows.uniform else q.shape[0]
    blocks = rows.once(("blocks", scores.window, length), q.device,
                       lambda: block_mask(rows, length, scores.window, q.device))
    batch = [to_batch(x, rows) if rows.uniform else x.transpose(0, 1)[None] for x in (q, k, v)]
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        out = _compiled()(*batch, score_mod=_capped(scores.softcap), block_mask=blocks, scale=scores.scale,
                          enable_gqa=q.shape[1] != k.shape[1])
    return from_batch(out, rows, length) if rows.uniform else out[0].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # As a full graph: torch would otherwise fall back, past its limit of compilations, to keeping all scores.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@functools.cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(rows: Rows, length: int, window: int | None, device: torch.device) -> "BlockMask":
    """Which blocks of keys each block of queries looks at, made from the rows' ends alone.

    `create_block_mask` would write out T × T. Uniform rows share the mask of one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    row = None if rows.uniform else rows.row_of(length, device)
    needed, full = _blocks(row, length, window, device)
    return BlockMask.from_kv_blocks(*_ordered(needed & ~full), *_ordered(full), BLOCK_SIZE=BLOCK,
                                    mask_mod=_sees(row, window), seq_lengths=(length, length))


def _blocks(row: Tensor | None, length: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, B] bool, queries by keys: blocks with anything to see, and those of which everything is seen."""
    block = torch.arange(-(-length // BLOCK), device=device)
    queries, keys = block[:, None], block
    needed = keys <= queries
    full = (keys < queries) & (queries < length // BLOCK)
    if window is not None:
        needed &= (queries - keys - 1) * BLOCK + 1 < window
        full &= (queries - keys + 1) * BLOCK - 1 < window
    if row is not None:
        first, last = row[block * BLOCK], row[(block * BLOCK + BLOCK - 1).clamp(max=length - 1)]
        needed &= first[:, None] <= last
        full &= last[:, None] == first
    return needed, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 1, B] how many, and [1, 1, B, B] which, those first."""
    count = blocks.sum(-1, dtype=torch.int32)
    return count[None, None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]


def _sees(row: Tensor | None, window: int | None) -> Callable[..., Tensor]:
    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if row is not None:
            seen = seen & (row[query] == row[key])
        return seen

    return sees
