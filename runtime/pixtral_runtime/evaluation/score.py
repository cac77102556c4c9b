"""How sure a score is, and whether two bundles' scores differ.

Scores are numbers from 0 to 1 (or ratings), one per example. Intervals are by bootstrap over examples, with a fixed
seed: the same scores give the same interval, always. Examples count as independent; questions about one picture are
not quite, so intervals of tasks that ask many are a little too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixtral_runtime.stats import ALPHA, SEED, Samples, finite_values, mcnemar, wilson

MEAN_RESAMPLES = 10_000
NUMBERS_DRAWN_AT_A_TIME = 1 << 22  # 32 MB

WORDING_POINTS = {"mathvista": 1.0, "mmmu": 1.5, "chartqa": 0.4}
"""Standard deviation of Pixtral's score over ten wordings of the prompt, in points (paper, table 7)."""
WORDING_MOST_POINTS = 1.5  # for tasks that the paper did not try


@dataclass(frozen=True)
class Score:
    """The mean of `n` examples' scores, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Samples) -> Score:
        """Raises ValueError where there are none.

        Where all are 0 or all are 1 a bootstrap would claim certainty; the interval is then Wilson's.
        """
        scores = finite_values(values)
        mean = float(scores.mean())
        if mean in (0, 1) and (scores == mean).all():
            low, high = wilson(int(mean) * len(scores), len(scores))
        else:
            low, high = map(float, np.percentile(_means(scores), (2.5, 97.5)))
        return cls(mean, low, high, len(scores))


@dataclass(frozen=True)
class Paired:
    """New minus old over the examples that both scored, with its 95 % interval.

    `better` and `worse` count examples whose score rose and fell. `test` names where `p_value` is from: McNemar's exact
    test where scores are 0 or 1, a paired bootstrap for others.
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
    def significant(self) -> bool:
        return self.p_value < ALPHA


def paired(old: Samples, new: Samples) -> Paired:
    """Compare scores of the same examples in the same order. Raises ValueError where they are not as many, or none."""
    before, after = finite_values(old), finite_values(new)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} scores are no pairs")
    change = after - before
    mean, better, worse = float(change.mean()), int((change > 0).sum()), int((change < 0).sum())
    means = _means(change)
    low, high = map(float, np.percentile(means, (2.5, 97.5)))
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        p_value, test = mcnemar(better, worse), "McNemar"
    else:
        as_far = np.abs(means - mean) >= abs(mean) - 1e-12  # as if there were no difference
        p_value, test = float((as_far.sum() + 1) / (len(means) + 1)), "paired bootstrap"
    return Paired(len(change), mean, low, high, p_value, test, better, worse)


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
