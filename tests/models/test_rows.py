"""How rows lie, read from what a layer is called with."""

import pytest
import torch

from gazelle.kernels.attention import Rows
from gazelle.models.rows import rows_of


def starts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_of_one_length() -> None:
    rows = rows_of(3, 5, {})
    assert (rows.count, rows.max_length, rows.uniform, rows.mask) == (3, 5, True, None)


def test_a_mask_of_scores_is_handed_on() -> None:
    mask = torch.zeros(2, 1, 4, 4)
    assert rows_of(2, 4, {"attention_mask": mask}).mask is mask


def test_rows_made_by_the_trainer_are_taken_as_they_are() -> None:
    rows = Rows(1, 4, uniform=True)
    assert rows_of(1, 4, {"gazelle_rows": rows, "cu_seq_lens_q": starts(0, 2, 4), "max_length_q": 2}) is rows


def test_packed_rows_are_made_once_a_batch() -> None:
    kwargs = {"cu_seq_lens_q": starts(0, 3, 4, 9), "max_length_q": 5}
    rows = rows_of(1, 9, kwargs)
    assert (rows.count, rows.max_length, rows.uniform, rows.sizes) == (3, 5, False, (3, 1, 5))
    assert rows_of(1, 9, kwargs) is rows
    kwargs["cu_seq_lens_q"][1] = 4  # the same tensor with another batch
    kwargs["cu_seq_lens_q"][2] = 6
    assert rows_of(1, 9, kwargs).sizes == (4, 2, 3)
    rows = rows_of(1, 9, kwargs)
    assert rows_of(1, 9, {**kwargs, "cu_seq_lens_q": kwargs["cu_seq_lens_q"].clone()}) is not rows


def test_positions_that_begin_anew() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    rows = rows_of(1, 6, {"position_ids": positions}, by_position=True)
    assert (rows.sizes, rows.max_length, rows.uniform) == ((3, 1, 2), 3, False)
    assert rows_of(1, 6, {"position_ids": positions}, by_position=True) is rows
    assert rows.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert rows_of(1, 6, {"position_ids": positions}).uniform
    assert rows_of(2, 3, {"position_ids": positions.view(2, 3)}, by_position=True).uniform


@pytest.mark.parametrize("positions", [[[4, 5, 6]], [[0, 1, 2]]])
def test_positions_of_one_row(positions: list[list[int]]) -> None:
    assert rows_of(1, 3, {"position_ids": torch.tensor(positions)}, by_position=True).sizes == (3,)


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        kwargs = {"cu_seq_lens_q": starts(0, 2, 4), "max_length_q": 2}
        assert rows_of(1, 4, kwargs) is rows_of(1, 4, kwargs)
