"""Masks that are a function of a seed."""

import pytest
import torch
from torch import Tensor

from gazelle.engine.dropout import dropped, new_seed

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def mask(rate: float, seed: int = 3, stream: int = 0, shape: tuple[int, int] = (400, 500)) -> Tensor:
    return dropped(torch.ones(shape), rate, torch.tensor([seed]), stream) != 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_rate(rate: float) -> None:
    kept = mask(rate).double()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / kept.numel()) ** 0.5)
    for dim in (0, 1):  # no row and no column is special
        spread = (rate * (1 - rate) / kept.shape[dim]) ** 0.5
        assert (kept.mean(dim) - (1 - rate)).abs().max() < 6 * spread
        assert kept.mean(dim).std().item() == pytest.approx(spread, rel=0.2)


def test_what_is_kept_is_scaled() -> None:
    x = torch.randn(60, 70, dtype=torch.float64)
    y = dropped(x, 0.25, torch.tensor([1]), 0)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert y.dtype == x.dtype


def test_one_seed_gives_one_mask() -> None:
    assert torch.equal(mask(0.3), mask(0.3))
    assert dropped(torch.ones(3, 4), 0.0, torch.tensor([1]), 0).eq(1).all()
    assert not mask(1.0).any()


@pytest.mark.parametrize("other", [{"seed": 4}, {"seed": 2**31 - 2}, {"stream": 1}, {"stream": 2}])
def test_seeds_and_streams_are_independent(other: dict[str, int]) -> None:
    both = (mask(0.5) & mask(0.5, **other)).double().mean().item()
    assert both == pytest.approx(0.25, abs=5e-3)
    first, second = mask(0.5).double() - 0.5, mask(0.5, **other).double() - 0.5
    for shift in (1, 500, 501):  # nor is one the other moved by some elements
        assert abs((first.flatten()[shift:] * second.flatten()[:-shift]).mean().item()) < 5e-3


def test_neighbours_are_independent() -> None:
    kept = mask(0.5).double() - 0.5
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[1:, 1:], kept[:-1, :-1])):
        assert abs((a * b).mean().item()) < 5e-3


def test_seeds_come_from_torch() -> None:
    torch.manual_seed(1)
    seeds = [new_seed(CPU).item() for _ in range(5)]
    torch.manual_seed(1)
    assert [new_seed(CPU).item() for _ in range(5)] == seeds
    assert len(set(seeds)) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_mask() -> None:
    x = torch.randn(33, 65)
    got = dropped(x.cuda(), 0.3, torch.tensor([7], device="cuda"), 2).cpu()
    assert torch.equal(got != 0, dropped(x, 0.3, torch.tensor([7]), 2) != 0)
    torch.testing.assert_close(got, dropped(x, 0.3, torch.tensor([7]), 2))
