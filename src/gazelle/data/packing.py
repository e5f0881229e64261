"""Rows into bins of a fixed number of tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from gazelle.base.errors import OptionError
from gazelle.data.encode import IGNORED, Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: longest row first, each into the fullest bin that still takes it.

    Takes O(n log n) comparisons; the same lengths always give the same bins. Johnson et al., "Worst-case performance
    bounds for simple one-dimensional packing algorithms", 1974: at most 11/9 of the fewest bins possible, plus a few.

    Args:
        lengths: tokens of each row.
        capacity: tokens of a bin.

    Returns:
        Bins of indices into `lengths`; every index is in exactly one.

    Raises:
        OptionError: a row longer than a bin.
    """
    if lengths and max(lengths) > capacity:
        raise OptionError("a row is longer than a bin", where="packing", found=f"{max(lengths)} tokens",
                          expected=f"at most {capacity}", fix="make bins larger, or encode with a smaller max_length")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> bins that have exactly as many
    rooms: list[int] = []  # the keys of with_room, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[chosen].append(index)
        left = room - lengths[index]
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(chosen)
    return bins


def wrap(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Lay the rows end to end and cut every `capacity` tokens: all bins but the last are full, and no token is lost.

    A piece that continues a row in the next bin is a row of its own, with its own positions and attention; its first
    token has nothing to be predicted from and loses its label.
    """
    bins: list[list[Example]] = []
    room = 0
    for example in examples:
        start = 0
        while start < len(example.input_ids):
            if room == 0:
                bins.append([])
                room = capacity
            ids = example.input_ids[start : start + room]
            labels = [IGNORED, *example.labels[start + 1 : start + room]]
            bins[-1].append(Example(ids, labels, example.where))
            start, room = start + len(ids), room - len(ids)
    return bins
