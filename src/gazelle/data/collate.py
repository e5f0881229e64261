"""Rows of one bin to tensors.

Shape legend: T tokens of the bin, R rows, L tokens of the longest row, n labelled tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gazelle.data.encode import IGNORED, Example


def collate(rows: Sequence[Example], *, round_up: bool = False) -> dict[str, Any]:
    """Lay rows end to end.

    Args:
        rows: at least one.
        round_up: T, R, n and L become sizes of which there are few, so that batches share their shapes: one more row
            of padding, rows without tokens, and targets that are not learnt are added behind the real ones.

    Returns:
        `input_ids`, `labels` and `position_ids` [1, T], the last starting at 0 in every row; `cu_seq_lens` [R + 1]
        int32, the offsets where rows begin, then T; `max_length` int, tokens of the longest row; `positions` [n] whose
        next token is labelled, and these tokens, `targets` [n]; `tokens` int, without padding; `sizes`, the rows'
        lengths; `uniform`, whether all rows are of one length.
    """
    lengths = [len(row.input_ids) for row in rows]
    tokens = sum(lengths)
    uniform = len(set(lengths)) == 1
    gap = rounded(tokens) - tokens if round_up and not uniform else 0
    if gap:
        lengths.append(gap)
    ids, labels = np.zeros(tokens + gap, np.int64), np.full(tokens + gap, IGNORED, np.int64)
    ids[:tokens] = np.concatenate([row.input_ids for row in rows])
    labels[:tokens] = np.concatenate([row.labels for row in rows])
    starts = np.fromiter(itertools.accumulate(lengths, initial=0), np.int32)
    places = np.arange(tokens + gap) - np.repeat(starts[:-1], lengths)
    positions = np.flatnonzero(labels[1:] != IGNORED)
    targets = labels[1:][positions]
    longest = max(lengths)
    if round_up:
        missing = min(rounded(len(positions)), tokens + gap) - len(positions)
        positions, targets = np.pad(positions, (0, missing)), np.pad(targets, (0, missing), constant_values=IGNORED)
    if round_up and not uniform:
        longest = min(rounded(longest), tokens + gap)
        starts = np.pad(starts, (0, rounded(len(lengths), 2) - len(lengths)), mode="edge")
    return {
        "input_ids": torch.from_numpy(ids)[None], "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(places)[None], "cu_seq_lens": torch.from_numpy(starts),
        "max_length": longest, "positions": torch.from_numpy(positions), "targets": torch.from_numpy(targets),
        "tokens": tokens, "sizes": tuple(lengths), "uniform": uniform,
    }


def rounded(size: int, steps: int = 8) -> int:
    """The next number of which there are only `steps` between two powers of two: at most 1/steps more than `size`."""
    step = max(1, 2 ** max(0, size - 1).bit_length() // (2 * steps))
    return -(-size // step) * step


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
