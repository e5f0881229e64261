"""From whatever was passed as `train_dataset` to batches: rows become bins, bins become padding-free batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from gazelle.data.collate import collate, collate_padded
from gazelle.data.encode import Encoded, Example
from gazelle.data.packing import pack, wrap


class Bins(Dataset[list[Example]]):
    """A map-style data set whose entries are lists of rows that share one slot of a batch."""

    def __init__(self, bins: Sequence[list[Example]]) -> None:
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[Example]:
        return self.bins[index]


def make_bins(encoded: Encoded, *, packing: bool, strategy: str, capacity: int) -> Bins:
    """One row an entry without packing; with it, as many rows as fit in `capacity` tokens."""
    rows = encoded.examples
    if not packing:
        return Bins([[row] for row in rows])
    if strategy == "wrapped":
        return Bins(wrap(rows, capacity))
    return Bins([[rows[index] for index in bin_] for bin_ in pack([len(row.input_ids) for row in rows], capacity)])


class Collator:
    """Joins the bins of a batch: end to end where the model takes packed rows, else padded on the right.

    Args:
        pad_token_id: None for packed batches, else the id to pad with.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, bins: list[list[Example]]) -> dict[str, Any]:
        rows = [row for bin_ in bins for row in bin_]
        if self.pad_token_id is not None:
            return collate_padded(rows, self.pad_token_id)
        batch: dict[str, Any] = collate(rows)
        # transformers hands these names through to the attention function (FlashAttentionKwargs).
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = batch.pop("cu_seq_lens")
        batch["max_length_q"] = batch["max_length_k"] = batch.pop("max_length")
        return batch


class DictRows(Dataset[dict[str, list[int]]]):
    """The rows as dictionaries, for a collator that the caller brought."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}


def labelled_targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose successor is labelled, and the ids they should predict.

    Args:
        labels: [1, T] with -100 where nothing is learnt.

    Returns:
        positions [n] (int64) and targets [n] (int64).
    """
    shifted = labels[0, 1:]
    positions = (shifted != -100).nonzero()[:, 0]
    return positions, shifted[positions]


CollatorLike = Callable[[list[Any]], dict[str, Any]]
