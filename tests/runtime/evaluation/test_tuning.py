"""Which setting is recommended, over many made-up matrices of answers: cliffs, no cliff, noise, too few examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pixtral_runtime.errors import SettingError
from pixtral_runtime.evaluation.tuning import (
    Scores,
    Tuned,
    Z,
    least_examples,
    mean_interval,
    rounds_of,
    tune,
)

SEEDS = 40
EXAMPLES = 2000
SAME = 0.98  # of two settings' answers; the others are drawn anew


def made_scores(shares: Sequence[float], seed: int, examples: int = EXAMPLES, same: float = SAME) -> Scores:
    """Right (1) and wrong (0) answers, (settings, examples), each setting right in so large a share."""
    random = np.random.default_rng(seed)
    hard = random.random(examples)
    own = random.random((len(shares), examples))
    mixed = np.where(random.random((len(shares), examples)) < same, hard, own)
    right: npt.NDArray[np.float64] = (mixed < np.array(shares)[:, None]).astype(float)
    return right


def tuned(scores: Scores, costs: Sequence[float] | None = None, **options: object) -> Tuned:
    dearer = costs or [64.0 * 2**number for number in range(len(scores))]
    answer = lambda setting, count: scores[setting, :count]  # noqa: E731
    return tune(len(scores), scores.shape[1], answer, dearer.__getitem__, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ((0.5, 0.6, 0.97, 0.97, 0.97), 2),  # a cliff
        ((0.3, 0.97, 0.97, 0.97, 0.97, 0.97, 0.97), 1),
        ((0.3, 0.4, 0.5, 0.6, 0.97), 4),  # nothing but the dearest will do
        ((0.97,) * 5, 0),  # no cliff
        ((0.6, 0.97, 0.97, 0.7, 0.97), 1),  # more tokens may be worse
        ((0.0,) * 4, 0),  # nothing helps, so the cheapest
        ((0.95, 0.5, 0.5, 0.5), 0),  # the cheapest is the best
    ],
)
def test_the_cheapest_setting_that_is_enough_is_found_at_less_than_a_third_of_the_cost(
    shares: Sequence[float], wanted: int
) -> None:
    results = [tuned(made_scores(shares, seed)) for seed in range(SEEDS)]
    assert sum(result.recommended == wanted for result in results) >= 0.95 * SEEDS
    assert np.mean([result.spent / result.full for result in results]) < 0.3


def test_intervals_hold_what_asking_everything_gives() -> None:
    held = []
    for seed in range(SEEDS):
        scores = made_scores((0.3, 0.8, 0.93, 0.95, 0.95), seed, same=0.9)
        result = tuned(scores)
        for setting, standing in enumerate(result.standings):
            whole = scores[setting].mean()
            held.append(standing.score.low <= whole <= standing.score.high)
            held.append(standing.difference.low <= whole - scores[result.best].mean() <= standing.difference.high)
    assert np.mean(held) >= 0.9


def test_a_setting_just_below_the_tolerance_is_hardly_ever_recommended() -> None:
    results = [tuned(made_scores((0.945, 0.945, 0.945, 0.97), seed)) for seed in range(SEEDS)]
    assert sum(result.recommended in (0, 1, 2) for result in results) <= 0.05 * SEEDS


def test_what_examples_would_hardly_prove_is_not_chased() -> None:
    """Four points below the best, it takes over a thousand examples to prove that 2 points are exceeded."""
    results = [tuned(made_scores((0.5, 0.955, 0.995), seed)) for seed in range(SEEDS)]
    assert sum(result.recommended == 2 for result in results) >= 0.95 * SEEDS
    assert np.mean([result.spent / result.full for result in results]) < 0.15


def test_scores_between_right_and_wrong_are_told_apart() -> None:
    random = np.random.default_rng(0)
    hard = random.beta(8, 2, EXAMPLES)
    scores = np.array([hard * loss + random.normal(0, 0.01, EXAMPLES) for loss in (0.6, 0.999, 1.0)]).clip(0, 1)
    result = tuned(scores)
    assert result.recommended == 1
    assert result.standings[0].state == "worse"
    assert result.standings[0].asked < result.standings[1].asked < EXAMPLES


def test_too_few_examples_are_said_to_be_too_few_and_how_many_are_missing() -> None:
    scores = made_scores((0.97,) * 3, 0, examples=100, same=1.0)
    result = tuned(scores)
    assert result.recommended is None
    assert result.more == least_examples(0.02) - 100
    assert {standing.state for standing in result.standings} == {"undecided"}
    assert tuned(made_scores((0.97,) * 3, 0, examples=100 + result.more, same=1.0)).recommended == 0
    assert tuned(scores, tolerance=0.1).recommended == 0


def test_the_budget_is_kept_and_too_small_a_one_refused() -> None:
    scores = made_scores((0.97,) * 4, 0)

    def within(most: int) -> Tuned:
        answered = [0] * len(scores)

        def answer(setting: int, count: int) -> Scores:
            answered[setting] = count
            return scores[setting, :count]

        afford = lambda settings: (most - sum(answered)) // len(settings)  # noqa: E731
        return tune(len(scores), EXAMPLES, answer, float, afford=afford)

    assert 240 < sum(standing.asked for standing in within(250).standings) <= 250
    assert sum(standing.asked for standing in within(4).standings) == 4
    with pytest.raises(SettingError, match="one example of each of 4 settings"):
        within(3)


def test_a_budget_that_is_never_reached_changes_nothing() -> None:
    scores = made_scores((0.5, 0.6, 0.97, 0.97), 0)
    assert tuned(scores, afford=lambda _: EXAMPLES) == tuned(scores)


def test_the_setting_that_judges_is_asked_to_the_end() -> None:
    result = tuned(made_scores((0.97,) * 4, 0), kept=3)
    assert result.recommended == 0
    assert result.best == 3
    assert result.standings[3].asked == result.standings[0].asked


def test_examples_without_a_score_count_nowhere() -> None:
    scores = made_scores((0.5, 0.97, 0.97), 0)
    scores[:, ::3] = np.nan
    scores[1, 1::7] = np.nan
    result = tuned(scores)
    assert result.recommended == 1
    assert result.standings[1].score.n < result.standings[1].asked
    nothing = tuned(np.full((2, 50), np.nan))
    assert nothing.recommended is None


def test_the_front_has_what_no_cheaper_setting_equals() -> None:
    result = tuned(made_scores((0.5, 0.9, 0.7, 0.98), 0))
    assert [standing.on_front for standing in result.standings] == [True, True, False, True]


def test_rounds_double_and_end_where_the_examples_do() -> None:
    assert rounds_of(500, 0.02) == [40, 80, 160, 320, 500]
    assert rounds_of(10**6, 0.02)[-1] == 32 * 40
    assert rounds_of(5, 0.02) == [5]


def test_the_interval_is_tangos_where_no_answer_changed() -> None:
    found = mean_interval(np.zeros(100), -1)
    assert found.high == pytest.approx(Z * Z / (100 + Z * Z), abs=1e-9)
    assert found.low == -found.high


def test_the_interval_is_wilsons_for_a_score() -> None:
    found = mean_interval(np.array([1.0] * 30 + [0.0] * 10), 0)
    for bound in (found.low, found.high):  # solves (p̂ - p)² = z² p (1 - p) / n
        assert (0.75 - bound) ** 2 == pytest.approx(Z * Z * bound * (1 - bound) / 40)
    assert math.isclose(mean_interval(np.empty(0), 0).high, 1.0)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, math.nan])
def test_a_tolerance_is_a_share(tolerance: float) -> None:
    with pytest.raises(SettingError, match="tolerance"):
        tuned(made_scores((0.5, 0.5), 0), tolerance=tolerance)


def test_examples_that_gave_no_score_are_needed_again() -> None:
    scores = made_scores((0.97,) * 2, 0, examples=200, same=1.0)
    scores[:, 100:] = np.nan
    assert tuned(scores).more == least_examples(0.02) - 100
