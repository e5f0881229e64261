"""From whatever was passed as `train_dataset` to batches: rows become bins, bins become padding-free batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling

from gazelle.data.collate import collate, collate_padded
from gazelle.data.encode import Encoded, Example
from gazelle.data.packing import pack, wrap
from gazelle.train.config import SFTConfig


class Bins(Dataset[dict[str, Any]]):
    """A map-style data set whose entries are lists of rows that share one slot of a batch.

    An entry shows the ids and labels of its rows end to end, for people who look at `trainer.train_dataset[0]`.
    """

    def __init__(self, bins: Sequence[list[Example]]) -> None:
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.bins[index]
        return {"input_ids": [token for row in rows for token in row.input_ids],
                "labels": [label for row in rows for label in row.labels], "rows": rows}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What the data loader asks for: the collator joins the rows itself."""
        return [{"rows": self.bins[index]} for index in indices]


def make_bins(encoded: Encoded, *, packing: bool, strategy: str, capacity: int) -> Bins:
    """One row an entry without packing; with it, as many rows as fit in `capacity` tokens."""
    rows = encoded.examples
    if not packing:
        return Bins([[row] for row in rows])
    if strategy == "wrapped":
        return Bins(wrap(rows, capacity))
    return Bins([[rows[index] for index in bin_] for bin_ in pack([len(row.input_ids) for row in rows], capacity)])


class Collator:
    """Joins the entries of `Bins` to a batch: end to end where the model takes packed rows, else padded on the right.

    Args:
        packed: end to end.
        pad_token_id: what to pad with otherwise.
        round_up: packed batches come in few shapes (`data.collate.collate`).
    """

    def __init__(self, packed: bool, pad_token_id: int, round_up: bool = False) -> None:
        self.packed, self.pad_token_id, self.round_up = packed, pad_token_id, round_up

    def __call__(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [row for entry in entries for row in entry["rows"]]
        if not self.packed:
            return collate_padded(rows, self.pad_token_id)
        batch: dict[str, Any] = collate(rows, round_up=self.round_up)
        # transformers hands these names through to the attention function (FlashAttentionKwargs).
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = batch.pop("cu_seq_lens")
        batch["max_length_q"] = batch["max_length_k"] = batch.pop("max_length")
        return batch


def moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on its device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def padding_id(tokenizer: Any) -> int:
    """What a `Collator` pads with: the tokenizer's padding, or its end of text where it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class DictRows(Dataset[dict[str, list[int]]]):
    """The rows as dictionaries, for a collator that the caller brought.

    Args:
        rows: the rows.
        labels: False for a collator that makes labels itself.
    """

    def __init__(self, rows: Sequence[Example], labels: bool = True) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        entry = {"input_ids": list(row.input_ids), "attention_mask": [1] * len(row.input_ids)}
        return entry | {"labels": list(row.labels)} if self.labels else entry


def rows_as_dataset(encoded: Any, config: SFTConfig, own_collator: Any, capacity: int) -> Any:
    """Encoded rows as the data set that batches are made from; of several evaluation sets, each by its name.

    Args:
        encoded: one set of rows, several by name, or None.
        config: how they are packed.
        own_collator: the caller's, or None for ours.
        capacity: of a bin, in tokens.
    """
    if encoded is None:
        return None
    if isinstance(encoded, dict):
        return {name: rows_as_dataset(part, config, own_collator, capacity) for name, part in encoded.items()}
    if own_collator is not None:
        return DictRows(encoded.examples, labels=not isinstance(own_collator, DataCollatorForLanguageModeling))
    return make_bins(encoded, packing=config.packing, strategy=config.packing_strategy, capacity=capacity)


def labelled_targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose successor is labelled, and the ids they should predict.

    Args:
        labels: [B, L] with -100 where nothing is learnt.

    Returns:
        positions [n] (int64) in the tokens of all rows, and targets [n] (int64).
    """
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    positions = (shifted != -100).nonzero()[:, 0]
    return positions, shifted[positions]
