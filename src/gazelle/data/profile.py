"""What the rows of training look like in a few numbers, so that a server can tell when what it is asked has moved away.

Lengths are counted in bins that hold a tenth of training's each. Tokens are counted by their rank in training: the
likeliest sixteen, those to rank 64 and so on, and all others. Two such counts are compared by the population stability
index Σ (q - p) ln(q / p) (https://doi.org/10.3390/risks7020053): above 0.1 something moved, above 0.25 much did.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gazelle.data.encode import IGNORED, Example

RANKS = (16, 64, 256, 1024)
LENGTHS, TOKENS = ("prompt_length", "answer_length"), ("prompt_tokens", "answer_tokens")
_LEAST = 1e-4  # share of an empty bin, whose logarithm would be infinite
_ROWS = 20_000  # as many rows say as much as all of a larger set


@dataclass(frozen=True)
class Profile:
    """Counts of a training set.

    Attributes:
        tokens: the likeliest tokens, at most `RANKS[-1]`, likeliest first.
        edges: of each statistic of `LENGTHS`, the upper ends of all bins but the last, which is open.
        counts: of each statistic of `LENGTHS` and `TOKENS`, how many answers, or tokens, are in each bin. Prompts are
            left out where training had none, as in raw text.
    """

    tokens: tuple[int, ...]
    edges: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the ids are one text, since JSON files of ours have a line a number."""
        return {"tokens": " ".join(map(str, self.tokens)), "edges": {name: list(at) for name, at in self.edges.items()},
                "counts": {name: list(counts) for name, counts in self.counts.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Profile":
        """What `to_dict` made.

        Raises:
            ValueError: it is something else.
        """
        try:
            tokens = tuple(map(int, content["tokens"].split()))
            edges = {str(name): tuple(map(int, at)) for name, at in content["edges"].items()}
            counts = {str(name): tuple(map(int, held)) for name, held in content["counts"].items()}
            bins = {name: len(edges[name]) if name in LENGTHS else len(RANKS) for name in counts}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no profile of training data: {error}") from error
        if unknown := counts.keys() - {*LENGTHS, *TOKENS}:
            raise ValueError(f"no profile of training data: it counts {', '.join(sorted(unknown))}")
        if any(len(held) != bins[name] + 1 or min(held) < 0 or not sum(held) for name, held in counts.items()):
            raise ValueError("no profile of training data: counts and bins do not fit")
        if any(low >= high for at in edges.values() for low, high in pairwise(at)):
            raise ValueError("no profile of training data: the ends of bins do not rise")
        return cls(tokens, edges, counts)


def profile_of(examples: Sequence[Example]) -> Profile | None:
    """The profile of encoded rows, each answer of a conversation counted with all that stands before it as its prompt.

    None if there is nothing to learn in them.
    """
    lengths: dict[str, list[int]] = {name: [] for name in LENGTHS}
    said: dict[str, Counter[int]] = {name: Counter() for name in TOKENS}
    for example in examples[:: max(1, len(examples) // _ROWS)]:
        labelled = np.asarray(example.labels) != IGNORED
        ids = np.asarray(example.input_ids)
        steps = np.diff(labelled.astype(np.int8), prepend=0, append=0)
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        # Of a text that is learnt throughout, the first token has no label because nothing stands before it.
        prompts = [int(start) for start in starts if start > 1]
        lengths["prompt_length"] += prompts
        lengths["answer_length"] += (ends - starts).tolist()
        said["answer_tokens"].update(ids[labelled].tolist())
        if prompts:
            said["prompt_tokens"].update(ids[~labelled].tolist())
    frequent = [token for token, _ in (said["prompt_tokens"] + said["answer_tokens"]).most_common(RANKS[-1])]
    bins = _bins_of(frequent)
    edges = {name: tuple(sorted({int(at) for at in np.quantile(held, np.arange(1, 10) / 10, method="lower")}))
             for name, held in lengths.items() if held}
    counts = {name: tuple(_length_counts(lengths[name], at)) for name, at in edges.items()}
    counts |= {name: tuple(_token_counts(held, bins)) for name, held in said.items() if held}
    return Profile(tuple(frequent), edges, counts) if counts else None


def stability_index(expected: Sequence[int], found: Sequence[int]) -> float:
    """The population stability index of two counts over the same bins; 0 if their shares are the same."""
    p, q = (np.maximum(np.asarray(counts, float) / sum(counts), _LEAST) for counts in (expected, found))
    return float(((q - p) * np.log(q / p)).sum())


class Drift:
    """How far what a server was asked and answered of late has moved away from training.

    Args:
        profile: of the training data.
        window: requests that count.
        least: requests before there is anything to say; of fewer, chance alone makes an index.
    """

    def __init__(self, profile: Profile, window: int = 1000, least: int = 100) -> None:
        self._profile, self._least = profile, least
        self._bins = _bins_of(profile.tokens)
        self._seen: deque[dict[str, list[int]]] = deque(maxlen=window)

    def add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Count one request: the ids of its prompt and of its answer."""
        seen = {}
        for name, ids in zip(TOKENS, (prompt, answer), strict=True):
            seen[name] = _token_counts(Counter(ids), self._bins)
        for name, ids in zip(LENGTHS, (prompt, answer), strict=True):
            if name in self._profile.edges:
                seen[name] = _length_counts([len(ids)], self._profile.edges[name])
        self._seen.append(seen)

    def indices(self) -> dict[str, float]:
        """The index of each statistic that training has; none while too few requests were seen."""
        window = list(self._seen)  # others may add while this is being counted
        if len(window) < self._least:
            return {}
        found = {name: np.sum([seen[name] for seen in window], axis=0).tolist() for name in self._profile.counts}
        return {name: stability_index(self._profile.counts[name], counts)
                for name, counts in found.items() if sum(counts)}


def _bins_of(tokens: Sequence[int]) -> dict[int, int]:
    """Token -> the bin of its rank."""
    return {token: int(np.searchsorted(RANKS, rank, side="right")) for rank, token in enumerate(tokens)}


def _token_counts(said: Mapping[int, int], bins: Mapping[int, int]) -> list[int]:
    counts = [0] * (len(RANKS) + 1)
    for token, times in said.items():
        counts[bins.get(token, len(RANKS))] += times
    return counts


def _length_counts(lengths: Iterable[int], edges: Sequence[int]) -> list[int]:
    where = np.searchsorted(edges, list(lengths), side="left")
    return np.bincount(where, minlength=len(edges) + 1).tolist()
