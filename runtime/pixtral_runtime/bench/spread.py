"""What samples of a measurement say: their spread, whether two sets differ, whether a run was warm and quiet.

Units are the caller's. Times of a step are skewed and have outliers, so sets are compared by medians: the ratio with an
interval by bootstrap, the chance that it is luck by Mann and Whitney's U test, which assumes no distribution. Both are
about the samples of two runs: a machine that is 1 % slower this week makes a significant difference of 1 %, which is
why a threshold belongs beside the test. The same samples give the same verdict, always.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixtral_runtime.stats import ALPHA, SEED, Samples, finite_values, mann_whitney

MEDIAN_RESAMPLES = 2000
LEAST_SAMPLES = 9  # a third of fewer can never be significantly slow
DRIFT_SHARE = 0.02  # of the median; less is not worth a longer warm-up
NOISE_CV = 0.05  # coefficient of variation


@dataclass(frozen=True)
class Spread:
    """`sd` is the standard deviation of a sample (n - 1), 0 where n is 1. Percentiles are interpolated."""

    n: int
    mean: float
    sd: float
    p50: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Samples) -> Spread:
        """Raises ValueError where there are none, or one is not finite."""
        values = finite_values(samples)
        sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
        return cls(len(values), float(values.mean()), sd, p50, p95, p99, float(values.min()), float(values.max()))

    @property
    def cv(self) -> float:
        """Coefficient of variation, sd / mean."""
        return self.sd / abs(self.mean) if self.mean else 0.0


@dataclass(frozen=True)
class Difference:
    """New against old. `ratio` is that of the medians, new / old, `low` to `high` its 95 % interval."""

    ratio: float
    low: float
    high: float
    p_value: float

    @property
    def significant(self) -> bool:
        return self.p_value < ALPHA

    def grew(self, threshold: float) -> bool:
        """Whether new is larger by more than `threshold`, 0.05 for 5 %, and not by luck: a regression of times."""
        return self.significant and self.ratio > 1 + threshold

    def shrank(self, threshold: float) -> bool:
        """Whether new is smaller by more than `threshold`, and not by luck: a regression of rates."""
        return self.significant and self.ratio < 1 - threshold


@dataclass(frozen=True)
class Verdict:
    """Whether something holds, and why. `bool(verdict)` is `holds`."""

    holds: bool
    reason: str

    def __bool__(self) -> bool:
        return self.holds


def significance(old: Samples, new: Samples) -> Difference:
    """Compare two sets of positive samples. Raises ValueError where one is empty, or a median is not positive."""
    before, after = finite_values(old), finite_values(new)
    medians = np.median(before), np.median(after)
    if min(medians) <= 0:
        raise ValueError(f"medians {medians[0]} and {medians[1]} have no ratio: samples must be positive")
    rng = np.random.default_rng(SEED)
    resampled = [np.median(rng.choice(side, (MEDIAN_RESAMPLES, len(side))), axis=1) for side in (before, after)]
    low, high = np.percentile(resampled[1] / resampled[0], (2.5, 97.5))
    return Difference(float(medians[1] / medians[0]), float(low), float(high), mann_whitney(before, after))


def is_warm(samples: Samples) -> Verdict:
    """Whether the first third of a run took as long as the rest; where it took longer, the warm-up was too short."""
    values = finite_values(samples)
    if len(values) < LEAST_SAMPLES:
        return Verdict(False, f"{len(values)} runs are too few to tell: take {LEAST_SAMPLES} or more")
    third = len(values) // 3
    drift = significance(values[third:], values[:third])
    percent = 100 * abs(drift.ratio - 1)
    if drift.significant and percent > 100 * DRIFT_SHARE:
        word = "longer" if drift.ratio > 1 else "shorter"
        remedy = "take more warm-up runs" if drift.ratio > 1 else "let the device cool, or lock its clocks"
        seen = f"the first third took {percent:.0f} % {word} than the rest (p = {drift.p_value:.2g})"
        return Verdict(False, f"{seen}: {remedy}")
    return Verdict(True, f"the first third and the rest differ by {percent:.1f} %")


def is_noisy(samples: Samples, bound: float = NOISE_CV) -> Verdict:
    """Whether the coefficient of variation is above `bound`."""
    spread = Spread.of(samples)
    seen = f"the deviation is {100 * spread.cv:.1f} % of the mean over {spread.n} runs"
    if spread.cv > bound:
        return Verdict(True, f"{seen}, above {100 * bound:.0f} %: stop other load, lock clocks, or take more runs")
    return Verdict(False, seen)
