"""The search for the fastest choice, against trying all of them."""

import itertools
import random

import pytest

from gazelle.engine import search
from gazelle.engine.search import Option, fastest, least


def peak(options: tuple[Option, ...], head: int) -> int:
    """By walking through a step: forward through every layer, the head, and back."""
    kept, most = 0, 0
    for option in options:
        most = max(most, kept + option.forward)
        kept += option.kept
    most = max(most, kept + head)
    for option in reversed(options):
        most = max(most, kept + option.backward)
        kept -= option.kept
    return most


def random_layers(seed: int, count: int = 4, options: int = 4, size: int = 60) -> list[list[Option]]:
    draw = random.Random(seed)
    return [[Option(*(draw.randrange(size) for _ in range(4))) for _ in range(options)] for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_limit_is_faster(seed: int) -> None:
    layers = random_layers(seed)
    head = seed * 7
    every = [(peak(chosen, head), sum(option.time for option in chosen)) for chosen in itertools.product(*layers)]
    low = min(most for most, _ in every)
    assert least(layers, head) == low
    assert fastest(layers, head, low - 1) is None
    for limit in range(low, max(most for most, _ in every) + 2):
        numbers = fastest(layers, head, limit)
        assert numbers is not None
        chosen = tuple(options[number] for options, number in zip(layers, numbers, strict=True))
        assert peak(chosen, head) <= limit
        assert sum(option.time for option in chosen) == min(time for most, time in every if most <= limit)


def test_of_equals_the_last_layers_keep() -> None:
    """What they keep is free again before the others' backward passes."""
    again, keep = Option(1, 5, 5, 10), Option(4, 5, 5, 0)
    assert fastest([[again, keep]] * 5, 0, 5 + 3 * 1 + 2 * 4) == [0, 0, 0, 1, 1]
    assert fastest([[keep, again]] * 5, 0, 5 + 3 * 1 + 2 * 4) == [1, 1, 1, 0, 0]


def test_what_does_not_fit_costs_no_more_than_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many sums to remember, what is found still fits, and is nearly as fast."""
    layers = random_layers(1, count=12, options=6, size=10**9)
    low = least(layers, 0)
    limits = [low + low * number // 5 for number in range(6)]
    exact = [fastest(layers, 0, limit) for limit in limits]
    monkeypatch.setattr(search, "SUMS", 400)
    for limit, numbers in zip(limits, exact, strict=True):
        found = fastest(layers, 0, limit)
        assert found is not None and numbers is not None
        times = [sum(options[number].time for options, number in zip(layers, picked, strict=True))
                 for picked in (found, numbers)]
        assert peak(tuple(options[number] for options, number in zip(layers, found, strict=True)), 0) <= limit
        assert times[1] <= times[0] <= times[1] * 1.05 + 10**7
