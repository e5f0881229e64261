"""Rows of one bin to tensors.

Shape legend: T tokens of the bin, R rows, L tokens of the longest row.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from gazelle.data.encode import IGNORED, Example


def collate(rows: Sequence[Example]) -> dict[str, Any]:
    """Lay rows end to end, without padding.

    Returns:
        `input_ids`, `labels` and `position_ids` [1, T], the last starting at 0 in every row; `cu_seq_lens` [R + 1]
        int32, the offsets where rows begin, then T; `max_length` int, tokens of the longest row.
    """
    lengths = [len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.input_ids]]),
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
        "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
        "cu_seq_lens": torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32),
        "max_length": max(lengths),
    }


def collate_padded(rows: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows under each other, padded on the right, for models that cannot take packed rows.

    Returns:
        `input_ids`, `labels` and `attention_mask` [R, L].
    """
    longest = max(len(row.input_ids) for row in rows)
    gaps = [longest - len(row.input_ids) for row in rows]
    padded = list(zip(rows, gaps, strict=True))
    return {
        "input_ids": torch.tensor([[*row.input_ids, *[pad_token_id] * gap] for row, gap in padded]),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * gap] for row, gap in padded]),
        "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
    }
