"""How sure a figure is, and whether two differ by more than chance. The computations are scipy's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999
_AT_ONCE = 10_000_000  # numbers that a resampling holds at a time


@dataclass(frozen=True)
class Estimate:
    """A figure over `count` cases, and the interval it lies in with the confidence asked for, if that can be told."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0


@dataclass(frozen=True)
class Difference:
    """Two models on the same cases.

    Attributes:
        value: mean of the second's score less the first's, over the cases.
        low, high: its interval, by bootstrap over the cases.
        better, worse: cases in which the second's score is higher, and lower.
        p: how often chance alone gives a difference as large, in either direction.
        test: the name of the test.
    """

    value: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    test: str


def mean_estimate(values: Sequence[float], *, yes_or_no: bool, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of scores, with its interval.

    Shares get Wilson's interval (https://doi.org/10.1080/01621459.1927.10502953): a bootstrap of 0 right of 80 would
    say that it is certain. All else gets the percentiles of a bootstrap over the cases.

    Args:
        values: one score a case.
        yes_or_no: every score is 0 or 1.
        confidence: of the interval.
        seed: of the bootstrap.
    """
    from scipy import stats

    scores = np.asarray(values, float)
    value = float(scores.mean())
    if yes_or_no:
        ends = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(confidence, method="wilson")
        return Estimate(value, float(ends.low), float(ends.high), len(scores))
    if len(scores) < 2:
        return Estimate(value, count=len(scores))
    low, high = bootstrap((scores,), confidence, seed)
    return Estimate(value, low, high, len(scores))


def ratio_estimate(tops: Sequence[float], bottoms: Sequence[float], *, confidence: float = 0.95, seed: int = 0
                   ) -> tuple[float, float | None, float | None]:
    """Σ tops / Σ bottoms, with the percentiles of a bootstrap over the pairs; without them for a single pair."""
    above, below = np.asarray(tops, float), np.asarray(bottoms, float)
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return value, None, None
    return value, *bootstrap((above, below), confidence, seed)


def compare(first: Sequence[float], second: Sequence[float], *, yes_or_no: bool, confidence: float = 0.95,
            seed: int = 0) -> Difference:
    """Compare two models' scores on the same cases.

    Right and wrong are compared by McNemar's exact test (https://doi.org/10.1007/BF02295996), other scores by a paired
    permutation test of the mean: exact for up to 13 cases, by `RESAMPLES` random exchanges beyond.
    """
    from scipy import stats

    a, b = np.asarray(first, float), np.asarray(second, float)
    better, worse = int((b > a).sum()), int((b < a).sum())
    value = float((b - a).mean())
    low, high = bootstrap((b - a,), confidence, seed) if len(a) > 1 else (value, value)
    if yes_or_no:
        p = mcnemar(better, worse)
        return Difference(value, low, high, better, worse, p, "McNemar, exact")
    p = 1.0
    if better or worse:
        batch = max(1, _AT_ONCE // len(a))
        p = float(stats.permutation_test((a, b), _mean_difference, permutation_type="samples", vectorized=True,
                                         n_resamples=RESAMPLES, batch=batch, rng=np.random.default_rng(seed)).pvalue)
    return Difference(value, low, high, better, worse, p, "paired permutation")


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact p-value from the cases that only one of two models has right: the two-sided sign test."""
    from scipy import stats

    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap(samples: "tuple[np.ndarray, ...]", confidence: float, seed: int) -> tuple[float, float]:
    """The interval of a mean (one array [n]) or of a ratio of sums (two), by percentiles over resampled cases."""
    from scipy import stats

    if all((sample == sample[0]).all() for sample in samples):  # which scipy warns of
        value = float(_statistic(*samples))
        return value, value
    found = stats.bootstrap(samples, _statistic, paired=len(samples) > 1, vectorized=True, confidence_level=confidence,
                            n_resamples=RESAMPLES, batch=max(1, _AT_ONCE // samples[0].size), method="percentile",
                            rng=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def _statistic(*samples: "np.ndarray", axis: int = -1) -> "np.ndarray":
    above, *below = (sample.sum(axis) for sample in samples)
    return above / (below[0] if below else samples[0].shape[axis])


def _mean_difference(a: "np.ndarray", b: "np.ndarray", axis: int = -1) -> "np.ndarray":
    return b.mean(axis) - a.mean(axis)
