"""One buffer for what lives only until the next matrix is made."""

import torch

from gazelle.engine.scratch import Scratch

CPU = torch.device("cpu")


def test_memory_is_shared_within_a_slot_and_grows() -> None:
    scratch = Scratch()
    first = scratch.matrix(4, 6, torch.float32, CPU)
    assert first.shape == (4, 6) and first.is_contiguous()
    assert scratch.matrix(2, 3, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert scratch.nbytes == 96
    large = scratch.matrix(5, 6, torch.float32, CPU)
    assert large.shape == (5, 6)
    assert scratch.nbytes == 120
    assert scratch.matrix(4, 6, torch.float32, CPU).data_ptr() == large.data_ptr()


def test_slots_and_types_are_apart() -> None:
    scratch = Scratch()
    matrices = [scratch.matrix(3, 3, torch.float32, CPU), scratch.matrix(3, 3, torch.float32, CPU, slot=1),
                scratch.matrix(3, 3, torch.bfloat16, CPU)]
    for number, matrix in enumerate(matrices):
        matrix.fill_(number)
    assert [matrix.unique().item() for matrix in matrices] == [0, 1, 2]
    assert scratch.nbytes == 36 + 36 + 18


def test_memory_is_given_back() -> None:
    scratch = Scratch()
    scratch.matrix(3, 3, torch.float32, CPU)
    scratch.clear()
    assert scratch.nbytes == 0
