"""Bins hold every row once and nothing too much; tensors say where rows begin."""

import random

import pytest
import torch

from gazelle.base.errors import OptionError
from gazelle.data.collate import collate, collate_padded
from gazelle.data.encode import Example
from gazelle.data.packing import pack, wrap


def rows_of(*lengths: int) -> list[Example]:
    """Rows that count up from 100, 200, ..., with their second half labelled."""
    return [Example(ids := list(range(100 * number, 100 * number + length)),
                    [-100 if at < (length + 1) // 2 else token for at, token in enumerate(ids)], f"row {number}")
            for number, length in enumerate(lengths, 1)]


def test_best_fit_decreasing_by_hand() -> None:
    assert pack([2, 7, 3, 5, 3], 10) == [[1, 2], [3, 4, 0]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_pack_properties(seed: int) -> None:
    random.seed(seed)
    capacity = random.randint(1, 3000)
    lengths = [min(capacity, int(random.expovariate(4 / capacity)) + 1) for _ in range(random.randint(1, 2000))]
    bins = pack(lengths, capacity)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in bin_) for bin_ in bins]
    assert max(filled) <= capacity
    assert min(filled) > 0
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) + 4 or min(lengths) > capacity / 2
    assert bins == pack(lengths, capacity)
    emptiest = min(range(len(bins)), key=filled.__getitem__)  # no bin's rows would have fitted into an earlier one
    assert all(filled[number] + lengths[bins[emptiest][0]] > capacity for number in range(emptiest))


def test_what_pack_refuses() -> None:
    with pytest.raises(OptionError, match="longer"):
        pack([3, 11], 10)


@pytest.mark.parametrize("seed", range(10))
def test_wrap_loses_no_token(seed: int) -> None:
    random.seed(seed)
    rows = rows_of(*(random.randint(1, 99) for _ in range(50)))
    capacity = random.randint(2, 150)
    bins = wrap(rows, capacity)
    pieces = [piece for bin_ in bins for piece in bin_]
    before, after = ([token for row in some for token in row.input_ids] for some in (rows, pieces))
    assert before == after
    assert all(sum(len(piece.input_ids) for piece in bin_) == capacity for bin_ in bins[:-1])
    assert all(piece.labels[0] == -100 for piece in pieces)
    labels = {label for row in rows for label in row.labels} - {piece.input_ids[0] for piece in pieces}
    assert {label for piece in pieces for label in piece.labels} == labels | {-100}


def test_collate_exactly() -> None:
    batch = collate(rows_of(3, 1, 2))
    assert batch["input_ids"].tolist() == [[100, 101, 102, 200, 300, 301]]
    assert batch["labels"].tolist() == [[-100, -100, 102, -100, -100, 301]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64
    assert type(batch["max_length"]) is int
    assert batch["max_length"] == 3


def test_collate_padded_exactly() -> None:
    batch = collate_padded(rows_of(3, 1), pad_token_id=7)
    assert batch["input_ids"].tolist() == [[100, 101, 102], [200, 7, 7]]
    assert batch["labels"].tolist() == [[-100, -100, 102], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
