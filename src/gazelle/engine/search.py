"""The choice for every layer that takes the least time within a limit on memory. Exact, not a heuristic.

What a layer's passes may use depends on the layers below only through how much these keep. So layer by layer, from
the first, it is enough to know for each sum of what is kept the least time that reaches it; and a sum is worth
knowing only if none smaller is as fast (Bellman's principle; the multiple-choice knapsack problem).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SUMS = 8192  # sums to go on with from a layer; more are thinned out, which costs at most a small part of the limit


@dataclass(frozen=True)
class Option:
    """One choice of one layer, in bytes and picoseconds: whole numbers, so that equal sums are equal.

    Attributes:
        kept: what stays until the layer's backward pass.
        forward: what its forward pass needs above what the layers below keep.
        backward: what its backward pass needs above what it and the layers below keep.
        time: what the choice costs.
    """

    kept: int
    forward: int
    backward: int
    time: int

    def most(self) -> int:
        """What this layer needs above what the layers below keep."""
        return max(self.forward, self.kept + self.backward)


def fastest(layers: Sequence[Sequence[Option]], head: int, limit: int) -> list[int] | None:
    """The number of each layer's option, such that everything stays within the limit and takes the least time.

    Args:
        layers: the options of each layer, from the first to the last.
        head: what the loss head needs above what all layers keep.
        limit: bytes.

    Returns:
        One number a layer; None if nothing is within the limit.
    """
    sums, times = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    for options in layers:
        kept, time, most = (torch.tensor([value(option) for option in options]) for value in (
            lambda option: option.kept, lambda option: option.time, Option.most))
        # Candidates in the order of the sum below: among equals, the one that keeps less so far comes first.
        fits = (sums[:, None] + most <= limit).flatten()
        reached = (sums[:, None] + kept).flatten()[fits]
        taken = (times[:, None] + time).flatten()[fits]
        if not len(reached):
            return None
        order = torch.argsort(taken, stable=True)
        order = order[torch.argsort(reached[order], stable=True)]
        lowest = torch.cummin(taken[order], 0).values
        worth = torch.ones_like(order, dtype=torch.bool)
        worth[1:] = lowest[1:] < lowest[:-1]
        order = order[worth]
        if len(order) > SUMS:
            order = order[torch.linspace(0, len(order) - 1, SUMS).round().long()]
        source = fits.nonzero().squeeze(1)[order]
        steps.append((source // len(options), source % len(options)))
        sums, times = reached[order], taken[order]
    within = int((sums + head <= limit).sum())
    if not within:
        return None
    at = within - 1  # the largest sum is the fastest
    chosen: list[int] = []
    for below, number in reversed(steps):
        chosen.append(int(number[at]))
        at = int(below[at])
    return chosen[::-1]


def least(layers: Sequence[Sequence[Option]], head: int) -> int:
    """The smallest limit within which there is a choice for every layer."""
    low, high = 0, max(head, *(option.most() for options in layers for option in options))
    high += sum(max(option.kept for option in options) for options in layers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _possible(layers, head, middle) else (middle + 1, high)
    return low


def _possible(layers: Sequence[Sequence[Option]], head: int, limit: int) -> bool:
    """Whoever keeps least at every layer leaves most to those above."""
    kept = 0
    for options in layers:
        possible = [option.kept for option in options if kept + option.most() <= limit]
        if not possible:
            return False
        kept += min(possible)
    return kept + head <= limit
