"""Intervals and tests against their formulas, against enumeration, and against scipy called directly."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gazelle.evaluate.statistics import compare, mcnemar, mean_estimate, ratio_estimate


def test_shares_have_wilsons_interval() -> None:
    z = stats.norm.ppf(0.975)
    for right, asked in ((0, 80), (10, 16), (80, 80)):
        p, n = right / asked, asked
        middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(
            p * (1 - p) / n + z * z / 4 / n / n)
        found = mean_estimate([1.0] * right + [0.0] * (asked - right), yes_or_no=True)
        assert found.value == p and found.count == n
        assert (found.low, found.high) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-12)


def test_the_bootstrap_of_a_mean_agrees_with_theory() -> None:
    scores = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_estimate(list(scores), yes_or_no=False)
    error = scores.std(ddof=1) / math.sqrt(len(scores))
    assert found.value == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error),
                                                    abs=0.1 * error)
    narrow = mean_estimate(list(scores), yes_or_no=False, confidence=0.5)
    assert narrow.high is not None and narrow.high - scores.mean() == pytest.approx(0.674 * error, rel=0.1)


def test_equal_scores_and_a_lone_one() -> None:
    same = mean_estimate([0.5] * 4, yes_or_no=False)
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    lone = mean_estimate([0.5], yes_or_no=False)
    assert (lone.low, lone.high, lone.count) == (None, None, 1)
    assert ratio_estimate([6.0], [3.0]) == (2.0, None, None)


def test_the_bootstrap_of_a_ratio() -> None:
    generator = np.random.default_rng(2)
    bottoms = generator.integers(1, 20, 60)
    tops = bottoms * 1.5 + generator.normal(0, 2, 60)
    value, low, high = ratio_estimate(list(tops), list(bottoms))
    chosen = generator.integers(0, 60, (20000, 60))
    want = np.quantile(tops[chosen].sum(1) / bottoms[chosen].sum(1), [0.025, 0.975])
    assert value == pytest.approx(tops.sum() / bottoms.sum())
    assert (low, high) == pytest.approx(tuple(want), abs=0.01)


@pytest.mark.parametrize(("better", "worse"), [(12, 0), (5, 2), (3, 3), (0, 1), (0, 0)])
def test_mcnemar_is_the_binomial_tail(better: int, worse: int) -> None:
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, better)) / 2**n
    assert mcnemar(better, worse) == pytest.approx(tail)


def test_right_and_wrong() -> None:
    first = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    second = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    found = compare(first, second, yes_or_no=True)
    assert (found.better, found.worse, found.value) == (5, 1, 0.5)
    assert found.p == pytest.approx(stats.binomtest(5, 6).pvalue) == pytest.approx(14 / 64)
    assert found.low <= found.value <= found.high
    assert compare(second, first, yes_or_no=True).value == -0.5


def test_scores_of_few_cases_are_exchanged_exhaustively() -> None:
    first, second = [0.1, 0.4, 0.3, 0.9, 0.2, 0.5, 0.6], [0.3, 0.45, 0.2, 0.95, 0.6, 0.55, 0.9]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    observed = abs(sum(differences))
    extreme = sum(abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) >= observed - 1e-12
                  for signs in itertools.product((1, -1), repeat=7))
    found = compare(first, second, yes_or_no=False)
    assert found.p == pytest.approx(extreme / 2**7)
    assert (found.better, found.worse) == (6, 1)


def test_scores_of_many_cases_agree_with_scipy() -> None:
    generator = np.random.default_rng(3)
    first = generator.uniform(size=120)
    second = first + generator.normal(0.03, 0.15, 120)
    found = compare(list(first), list(second), yes_or_no=False)
    want = stats.permutation_test((second - first,), np.mean, permutation_type="samples", n_resamples=20000,
                                  rng=np.random.default_rng(9)).pvalue
    assert 0.001 < want < 0.5
    assert found.p == pytest.approx(want, abs=3 * math.sqrt(want * (1 - want) * (1 / 9999 + 1 / 20000)))
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=0.2)


def test_no_difference_at_all() -> None:
    found = compare([0.5, 0.2], [0.5, 0.2], yes_or_no=False)
    assert (found.p, found.value, found.low, found.high, found.better) == (1.0, 0.0, 0.0, 0.0, 0)
