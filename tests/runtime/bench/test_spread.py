"""Spread, significance and verdicts: published values, and their errors over many random runs."""

from __future__ import annotations

from dataclasses import astuple
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt
import pytest

from pixtral_runtime.bench.spread import Difference, Spread, is_noisy, is_warm, significance
from pixtral_runtime.stats import ALPHA, mann_whitney

PAIRS = 500
APPROXIMATION = 6e-3  # seen 4.9e-3, on p-values near 1
FALSE_POSITIVES = 0.07  # of 500 pairs; seen 0.038 to 0.054; the test's own 5 % has a standard error of 1 %


def times(seed: int, n: int = 20, mean: float = 100.0, noise: float = 0.03) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(mean, noise * mean, n)


def test_spread_is_the_textbook_one() -> None:
    spread = Spread.of([2, 4, 4, 4, 5, 5, 7, 9])
    assert astuple(spread) == pytest.approx((8, 5.0, (32 / 7) ** 0.5, 4.5, 8.3, 8.86, 2, 9))
    assert spread.cv == pytest.approx((32 / 7) ** 0.5 / 5)
    assert Spread.of([3.0]) == Spread(1, 3, 0, 3, 3, 3, 3, 3)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_what_is_no_list_of_numbers_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Spread.of(samples)
    with pytest.raises(ValueError, match="finite"):
        significance([1.0], samples)


def test_times_of_zero_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="positive"):
        significance([0.0, 0.0], [1.0, 1.0])


def test_p_values_are_the_published_ones() -> None:
    # The example of scipy.stats.mannwhitneyu's documentation: U = 17, exact p = 0.1111.
    assert mann_whitney([19, 22, 16, 29, 24], [20, 11, 17, 12]) == pytest.approx(0.1111111111111111, abs=1e-12)
    # Complete separation: two of the C(8, 4) splits are as far out.
    assert mann_whitney([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / comb(8, 4), abs=1e-15)


def test_ties_are_counted_exactly_as_by_trying_all_splits() -> None:
    first, second = [1.0, 2.0, 2.0, 3.0], [2.0, 3.0, 3.0, 4.0, 4.0]
    pooled = first + second

    def u(chosen: tuple[int, ...]) -> float:
        rest = [pooled[index] for index in range(len(pooled)) if index not in chosen]
        return sum((pooled[i] > other) + 0.5 * (pooled[i] == other) for i in chosen for other in rest)

    middle = len(first) * len(second) / 2
    splits = [abs(u(chosen) - middle) for chosen in combinations(range(len(pooled)), len(first))]
    as_far = sum(distance >= abs(u((0, 1, 2, 3)) - middle) for distance in splits)
    assert mann_whitney(first, second) == pytest.approx(as_far / len(splits), abs=1e-15)


@pytest.mark.parametrize("digits", [6, 0])  # 0: many ties
def test_the_normal_approximation_meets_the_exact_values(digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(times(seed).round(digits), times(seed + 1000, mean=101).round(digits)) for seed in range(20)]
    exact = [mann_whitney(*pair) for pair in pairs]
    monkeypatch.setattr("pixtral_runtime.stats.EXACT_SAMPLES", 0)
    approximate = [mann_whitney(*pair) for pair in pairs]
    assert approximate != exact
    assert approximate == pytest.approx(exact, abs=APPROXIMATION)


def test_identical_samples_give_no_difference() -> None:
    same = significance(times(0), times(0))
    assert same.ratio == 1 and same.low <= 1 <= same.high and same.p_value == 1
    assert not same.significant and not same.grew(0) and not same.shrank(0)
    assert significance([5.0] * 50, [5.0] * 50) == Difference(1, 1, 1, 1)


def test_a_tenth_more_is_found_under_noise_of_three_percent() -> None:
    for seed in range(50):
        slower = significance(times(seed), times(seed + 1000, mean=110))
        assert slower.grew(0.05) and not slower.shrank(0.05)
        assert 1 < slower.low < slower.ratio < slower.high
        faster = significance(times(seed + 1000, mean=110), times(seed))
        assert faster.shrank(0.05) and not faster.grew(0.05)


def test_a_change_below_the_threshold_is_no_regression() -> None:
    slower = significance(times(0, 200, noise=0.01), times(1, 200, mean=102, noise=0.01))
    assert slower.significant and not slower.grew(0.05)


@pytest.mark.parametrize("n", [6, 20, 50])
def test_the_same_distribution_seldom_differs(n: int) -> None:
    wrong = sum(mann_whitney(times(seed, n), times(seed + 10_000, n)) < ALPHA for seed in range(PAIRS))
    assert wrong / PAIRS <= FALSE_POSITIVES


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    pairs = [significance(times(seed), times(seed + 10_000, mean=110)) for seed in range(200)]
    assert 0.9 <= np.mean([pair.low <= 1.1 <= pair.high for pair in pairs]) <= 1  # seen 0.965


def test_the_same_samples_give_the_same_verdict() -> None:
    assert significance(times(3), times(4)) == significance(times(3), times(4))


def test_a_run_that_starts_slowly_is_not_warm() -> None:
    assert is_warm(times(0))
    cold = is_warm(np.concatenate([times(1, 10, mean=120), times(2, 20)]))
    assert not cold and "longer" in cold.reason and "more warm-up runs" in cold.reason
    throttled = is_warm(np.concatenate([times(1, 10, mean=80), times(2, 20)]))
    assert not throttled and "shorter" in throttled.reason and "clocks" in throttled.reason
    few = is_warm([1.0, 1.0, 1.0])
    assert not few and "3 runs" in few.reason


def test_a_steady_run_is_seldom_called_cold() -> None:
    assert np.mean([not is_warm(times(seed, 30)) for seed in range(PAIRS)]) <= FALSE_POSITIVES


def test_a_wide_spread_is_noisy() -> None:
    quiet, loud = is_noisy(times(0)), is_noisy(times(0, noise=0.2))
    assert not quiet and "runs" in quiet.reason
    assert loud and "above 5 %" in loud.reason
    assert is_noisy(times(0), bound=0.01)
