"""How the rows of a batch lie, read once a batch from what transformers hands to every layer."""

import itertools
from typing import Any

import torch
from torch import Tensor

from gazelle.kernels.attention import Rows

_last: tuple[Tensor, int, Rows] | None = None


def rows_of(batch: int, length: int, kwargs: dict[str, Any], by_position: bool = False) -> Rows:
    """Where rows begin in a batch of [batch, length] tokens.

    Args:
        batch, length: of the batch.
        kwargs: what a decoder layer is called with: `gazelle_rows`, or `cu_seq_lens_q` and `max_length_q`, or
            `attention_mask`, or none of them.
        by_position: a single sequence without a mask may be rows whose positions begin anew (FlashAttention reads
            `position_ids` so; for other implementations transformers makes a mask of them).
    """
    if (rows := kwargs.get("gazelle_rows")) is not None:
        return rows
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None:
        return _last_of(starts) or _remember(starts, _packed(starts, kwargs["max_length_q"]))
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None and by_position and batch == 1 and positions is not None:
        return _last_of(positions) or _remember(positions, _by_position(positions.flatten()))
    return Rows(batch, length, uniform=True, mask=mask)


def _packed(starts: Tensor, longest: int) -> Rows:
    sizes = tuple(starts.diff().tolist()) if starts.device.type == "cpu" else None
    return Rows(len(starts) - 1, longest, cu_seqlens=starts, sizes=sizes)


def _by_position(positions: Tensor) -> Rows:
    begins = (positions.diff() != 1).nonzero()[:, 0] + 1
    edges = [0, *begins.tolist(), len(positions)]
    return _packed(torch.tensor(edges, dtype=torch.int32, device=positions.device),
                   max(end - begin for begin, end in itertools.pairwise(edges)))


def _last_of(key: Tensor) -> Rows | None:
    # Holding on to the tensor itself keeps another from being taken for it.
    return _last[2] if _last is not None and _last[0] is key and _last[1] == _version(key) else None


def _remember(key: Tensor, rows: Rows) -> Rows:
    global _last
    _last = key, _version(key), rows
    return rows


def _version(key: Tensor) -> int:
    return 0 if key.is_inference() else key._version
