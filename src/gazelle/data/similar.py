"""Rows that are the same, or nearly, found in memory that does not grow with their length.

Nearly the same: character 5-grams of the texts, in small letters and with white space made even, overlap by a Jaccard
index of `threshold`. Pairs to compare are found by MinHash in bands (Broder 1997; Leskovec et al., Mining of Massive
Datasets, 3.4), and then compared exactly.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint32]

GRAM = 5
BANDS, IN_BAND = 20, 4  # pairs of index 0.8 are missed once in 30,000, those of 0.7 once in 250
_PERMUTATIONS = BANDS * IN_BAND
_CHUNK = 4096
_RNG = np.random.default_rng(20)
_MULTIPLIERS = (_RNG.integers(1, 2**32, _PERMUTATIONS, np.uint64) | 1).astype(np.uint32)
_ADDENDS = _RNG.integers(0, 2**32, _PERMUTATIONS, np.uint64).astype(np.uint32)


def plain(text: str) -> str:
    """`text` in small letters, with white space made even."""
    return " ".join(text.casefold().split())


def digest(text: str) -> int:
    """64 bits that stand for a text: among a million, two differing ones share them once in 40 million times."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def grams(text: str) -> Hashes:
    """Hashes of the character 5-grams of a plain text, sorted, each once; of the text itself if it is shorter."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if len(codes) < GRAM:
        codes = np.pad(codes, (0, GRAM - len(codes)))
    size = len(codes) - GRAM + 1
    hashed = np.zeros(size, np.uint32)
    for place in range(GRAM):
        hashed = (hashed ^ codes[place:place + size]) * np.uint32(0x9E3779B1)
        hashed ^= hashed >> np.uint32(15)
    return np.unique(hashed)


def jaccard(one: Hashes, other: Hashes) -> float:
    """The share of 5-grams of both that are in both."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


class Bands:
    """Keys of rows, by which near ones are found: rows that share a key are likely to be near."""

    def __init__(self) -> None:
        self._keys = np.empty((1024, BANDS), np.uint64)
        self._rows = np.empty(1024, np.int64)
        self._count = 0

    def add(self, row: int, hashed: Hashes) -> None:
        """Note a row by its hashes; rows come in ascending order."""
        least = np.full(_PERMUTATIONS, 0xFFFFFFFF, np.uint32)
        for first in range(0, len(hashed), _CHUNK):
            mixed = hashed[first:first + _CHUNK, None] * _MULTIPLIERS + _ADDENDS
            mixed ^= mixed >> np.uint32(16)
            np.minimum(least, (mixed * np.uint32(0x85EBCA6B)).min(0), out=least)
        keys = np.zeros(BANDS, np.uint64)
        for place in range(IN_BAND):
            keys = (keys ^ least[place::IN_BAND]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        if self._count == len(self._rows):
            self._keys = np.concatenate([self._keys, np.empty_like(self._keys)])
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._keys[self._count], self._rows[self._count] = keys, row
        self._count += 1

    def candidates(self, most: int = 8) -> dict[int, list[int]]:
        """Row -> earlier rows that share a key with it, at most `most`, the first of each key and the one before it."""
        found = dict[int, dict[int, None]]()
        for band in range(BANDS):
            keys = self._keys[:self._count, band]
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])) if self._count else order
            ends = np.append(starts[1:], self._count)
            for first, last in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
                group = self._rows[order[first:last]]
                for place in range(1, len(group)):
                    near = found.setdefault(int(group[place]), {})
                    near |= dict.fromkeys((int(group[0]), int(group[place - 1])))
        return {row: sorted(near)[:most] for row, near in found.items()}


def near_rows(texts: Iterable[tuple[int, str]], candidates: dict[int, list[int]],
              threshold: float) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row, Jaccard index) for every row that is near one of its candidates: the nearest of them.

    Args:
        texts: row and plain text, in ascending order, all that `candidates` names among them.
        candidates: as `Bands.candidates` gives them.
    """
    last_use: dict[int, int] = {}
    for row, earlier in candidates.items():
        for other in earlier:
            last_use[other] = max(row, last_use.get(other, row))
    ends: dict[int, list[int]] = {}
    for other, row in last_use.items():
        ends.setdefault(row, []).append(other)
    held: dict[int, Hashes] = {}
    for row, text in texts:
        if row not in candidates and row not in last_use:
            continue
        hashed = grams(text)
        if row in last_use:
            held[row] = hashed
        if row in candidates:
            index, other = max((jaccard(hashed, held[other]), -other) for other in candidates[row])
            if index >= threshold:
                yield row, -other, index
        for done in ends.get(row, ()):
            del held[done]
