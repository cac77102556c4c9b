"""Tests and intervals that benchmarks and evaluations share: Mann and Whitney's U, McNemar's test, Wilson's interval.

The same samples give the same answer, always: what is drawn at random is drawn from `SEED`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ALPHA = 0.05
SEED = 0
EXACT_SAMPLES = 40  # of both sets together; above, U is normal enough

Samples = Sequence[float] | npt.NDArray[np.float64]

Z_97_5 = 1.959964  # 97.5 % of a normal distribution lie below


def mann_whitney(first: Samples, second: Samples) -> float:
    """Two-sided p-value of Mann and Whitney's U (Annals of Mathematical Statistics 18, 1947), ties counted as halves.

    Exact for up to `EXACT_SAMPLES` in both sets together, ties or not; beyond by the normal approximation with
    correction for ties and continuity.
    """
    a, b = finite_values(first), finite_values(second)
    ranks = _doubled_ranks(np.concatenate([a, b]))
    rank_sum, total = int(ranks[: len(a)].sum()), len(ranks)
    middle = len(a) * (total + 1)  # of the doubled rank sum
    if total <= EXACT_SAMPLES:
        counts = _rank_sum_counts(ranks, len(a))
        distances = np.abs(np.arange(len(counts)) - middle)
        return float(counts[distances >= abs(rank_sum - middle)].sum() / counts.sum())
    _, ties = np.unique(ranks, return_counts=True)
    tied = float((ties.astype(float) ** 3 - ties).sum()) / (total * (total - 1))
    sd = math.sqrt(len(a) * len(b) / 12 * (total + 1 - tied))
    if sd == 0:
        return 1.0
    return math.erfc(max(0.0, abs(rank_sum - middle) / 2 - 0.5) / sd / math.sqrt(2))


def finite_values(samples: Samples) -> npt.NDArray[np.float64]:
    """The samples as an array (n,). Raises ValueError if there are none, or one is not finite."""
    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("samples must be a list of at least one finite number")
    return values


def _doubled_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Ranks from 1, equal values sharing the mean of theirs, all times two to stay whole."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    doubled: npt.NDArray[np.int64] = (2 * last - counts + 1)[inverse]
    return doubled


def _rank_sum_counts(ranks: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    """How many subsets of `size` ranks have each sum: (sums,), by adding one rank after the other."""
    counts = np.zeros((size + 1, int(ranks.sum()) + 1))
    counts[0, 0] = 1
    for rank in ranks:
        counts[1:, rank:] += counts[:-1, :-rank].copy()
    row: npt.NDArray[np.float64] = counts[size]
    return row


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p-value of McNemar's exact test: the chance of so uneven a split if each were a coin's toss."""
    total, fewer = better + worse, min(better, worse)
    log_half = total * math.log(2)
    tail = sum(math.exp(_log_choose(total, k) - log_half) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Journal of the American Statistical Association 22, 1927)."""
    share = right / total
    centre = share + Z_97_5 * Z_97_5 / (2 * total)
    spread = Z_97_5 * math.sqrt(share * (1 - share) / total + Z_97_5 * Z_97_5 / (4 * total * total))
    scale = 1 + Z_97_5 * Z_97_5 / total
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def _log_choose(total: int, some: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(some + 1) - math.lgamma(total - some + 1)
