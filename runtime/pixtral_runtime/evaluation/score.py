"""How sure a score is, and whether two bundles' scores differ.

Scores are numbers from 0 to 1 (or ratings, or nats), one per example, which may have weights, such as a text's tokens.
Intervals are by bootstrap over examples, with a fixed seed: the same scores give the same interval, always. Examples
count as independent; questions about one picture are not quite, nor windows of one text, so intervals of tasks that
have many are a little too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixtral_runtime.stats import ALPHA, SEED, Samples, finite_values, mcnemar, wilson

MEAN_RESAMPLES = 10_000
NUMBERS_DRAWN_AT_A_TIME = 1 << 22  # 32 MB

WORDING_POINTS = {"mathvista": 1.0, "mmmu": 1.5, "chartqa": 0.4}
"""Standard deviation of Pixtral's score over ten wordings of the prompt, in points (paper, table 7)."""
WORDING_MOST_POINTS = 1.5  # for tasks that the paper did not try
PERPLEXITY_PERCENT = 1.0  # more of it than this is a loss: our own bound, as no wording is in the way


@dataclass(frozen=True)
class Score:
    """The mean of `n` examples' scores, weighted or not, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Samples, weights: Samples | None = None) -> Score:
        """Raises ValueError where there are none.

        Where all are 0 or all are 1 a bootstrap would claim certainty; the interval is then Wilson's.
        """
        scores, heavy = finite_values(values), _unequal(weights)
        mean = float(np.average(scores, weights=heavy))
        if mean in (0, 1) and (scores == mean).all():
            low, high = wilson(int(mean) * len(scores), len(scores))
        else:
            means = _means(scores) if heavy is None else _weighted_means(scores, heavy)
            low, high = map(float, np.percentile(means, (2.5, 97.5)))
        return cls(mean, low, high, len(scores))

    @property
    def has_interval(self) -> bool:
        """Whether the bounds say anything: those of a bootstrap of equal numbers, or of one, do not."""
        return self.low < self.high

    def exponential(self) -> Score:
        """A perplexity of nats, with their interval."""
        return Score(math.exp(self.mean), math.exp(self.low), math.exp(self.high), self.n)


@dataclass(frozen=True)
class Paired:
    """New minus old over the examples that both scored, with its 95 % interval.

    `better` and `worse` count examples whose score rose and fell, or fell and rose where less is better. `test` names
    where `p_value` is from: McNemar's exact test where scores are 0 or 1, a paired bootstrap for others.
    """

    n: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    better: int
    worse: int

    @property
    def has_interval(self) -> bool:
        """As of a `Score`."""
        return self.low < self.high

    @property
    def significant(self) -> bool:
        return self.p_value < ALPHA


def paired(old: Samples, new: Samples, weights: Samples | None = None, *, less_is_better: bool = False) -> Paired:
    """Compare scores of the same examples in the same order. Raises ValueError where they are not as many, or none.

    Where no score from 0 to 1 has changed the interval is Tango's, which is Wilson's of no change either way; where all
    went from one to the other, it is Wilson's of that. A bootstrap of few changes knows no other ones than those: its
    p-value is never below that of as many tosses of a coin that all fall alike.
    """
    before, after = finite_values(old), finite_values(new)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} scores are no pairs")
    change, heavy = after - before, _unequal(weights)
    mean, better, worse = float(np.average(change, weights=heavy)), int((change > 0).sum()), int((change < 0).sum())
    if less_is_better:
        better, worse = worse, better
    means = _means(change) if heavy is None else _weighted_means(change, heavy)
    low, high = map(float, np.percentile(means, (2.5, 97.5)))
    if heavy is None and abs(change).max() in (0, 1) and (change == change[0]).all() and _are_shares(before, after):
        low, high = _same_change(change)
    if heavy is None and np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        p_value, test = mcnemar(better, worse), "McNemar"
    else:
        as_far = np.abs(means - mean) >= abs(mean) - 1e-12  # as if there were no difference
        p_value, test = float((as_far.sum() + 1) / (len(means) + 1)), "paired bootstrap"
        p_value = max(p_value, mcnemar(better + worse, 0))
    return Paired(len(change), mean, low, high, p_value, test, better, worse)


def _are_shares(*scores: npt.NDArray[np.float64]) -> bool:
    return all(((values >= 0) & (values <= 1)).all() for values in scores)


def _same_change(change: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The interval where all shares changed by 0, by 1 or by -1, of which a bootstrap would be certain."""
    if not change.any():
        _, most = wilson(0, len(change))
        return -most, most
    least, _ = wilson(len(change), len(change))
    return (least, 1.0) if change[0] > 0 else (-1.0, -least)


def wording_points(task: str) -> float:
    """How far another wording of a task's prompt moves Pixtral's score, in points."""
    return WORDING_POINTS.get(task, WORDING_MOST_POINTS)


def verdict(task: str, change: Paired) -> str:
    """What a difference in scores from 0 to 1 means, beside what another wording of the prompt does to Pixtral."""
    points, most = 100 * change.difference, 100 * max(abs(change.low), abs(change.high))
    wording = wording_points(task)
    source = "as the paper saw over ten prompts" if task in WORDING_POINTS else "the most that the paper saw, elsewhere"
    beside = f"±{wording} points that another wording of the prompt makes ({source})"
    if not change.significant:
        room = "too few examples to say more" if most > wording else "less than the " + beside
        return f"no difference can be shown (p = {change.p_value:.2g}); at most {most:.2f} points: {room}"
    word = "better" if points > 0 else "worse"
    size = f"{word} by {abs(points):.2f} points (p = {change.p_value:.2g})"
    if abs(points) <= wording:
        return f"{size}, not luck, but within the {beside}"
    return f"{size}, more than the {beside}"


def perplexity_verdict(change: Paired) -> str:
    """What a difference in nats a token means: a factor of the perplexity."""
    percent, low, high = (100 * (math.exp(nats) - 1) for nats in (change.difference, change.low, change.high))
    if not change.significant:
        most = max(abs(low), abs(high))
        return f"no difference can be shown (p = {change.p_value:.2g}); at most {most:.2f} % of the perplexity"
    word, beside = ("better" if percent < 0 else "worse"), f"{low:+.2f} to {high:+.2f} %, p = {change.p_value:.2g}"
    size = f"{word} by {abs(percent):.2f} % of the perplexity ({beside})"
    if percent < 0:
        return f"{size}, not luck"
    bound = "less" if percent <= PERPLEXITY_PERCENT else "more"
    return f"{size}, not luck, and {bound} than the {PERPLEXITY_PERCENT:g} % that is no loss here"


def _unequal(weights: Samples | None) -> npt.NDArray[np.float64] | None:
    """Weights as an array; None where they are all the same, as if there were none."""
    if weights is None:
        return None
    heavy = finite_values(weights)
    return heavy if (heavy != heavy[0]).any() else None


def _weighted_means(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weighted means of `MEAN_RESAMPLES` samples of as many values with their weights, drawn with replacement."""
    rng = np.random.default_rng(SEED)
    rows = max(1, NUMBERS_DRAWN_AT_A_TIME // len(values))
    blocks = []
    for done in range(0, MEAN_RESAMPLES, rows):
        drawn = rng.integers(0, len(values), (min(rows, MEAN_RESAMPLES - done), len(values)))
        blocks.append((values[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1))
    return np.concatenate(blocks)


def _means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means of `MEAN_RESAMPLES` samples of as many values, drawn with replacement."""
    unique, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(SEED)
    if len(unique) <= 16:  # scores are mostly 0 and 1: drawing how often each comes is drawing them
        drawn = rng.multinomial(len(values), counts / len(values), MEAN_RESAMPLES)
        few: npt.NDArray[np.float64] = drawn @ unique / len(values)
        return few
    rows = max(1, NUMBERS_DRAWN_AT_A_TIME // len(values))
    blocks = [
        rng.choice(values, (min(rows, MEAN_RESAMPLES - done), len(values))).mean(1)
        for done in range(0, MEAN_RESAMPLES, rows)
    ]
    return np.concatenate(blocks)
