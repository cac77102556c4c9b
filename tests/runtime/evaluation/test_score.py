"""Scores' intervals and tests, against closed forms and against what they promise over many samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pixtral_runtime.evaluation.score import Paired, Score, paired, verdict
from pixtral_runtime.stats import mcnemar, wilson


def test_the_interval_of_a_share_is_the_normal_ones_where_there_are_many_examples() -> None:
    score = Score.of([1.0] * 800 + [0.0] * 200)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert (score.mean, score.n) == (0.8, 1000)
    assert score.low == pytest.approx(0.8 - half, abs=0.002) and score.high == pytest.approx(0.8 + half, abs=0.002)


def test_the_interval_of_graded_scores_is_the_normal_ones_too() -> None:
    values = np.random.default_rng(1).random(400)  # drawn one by one, unlike shares
    score = Score.of(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert score.low == pytest.approx(values.mean() - half, abs=0.002)
    assert score.high == pytest.approx(values.mean() + half, abs=0.002)


@pytest.mark.parametrize("graded", [False, True])
def test_intervals_hold_the_truth_19_times_in_20(graded: bool) -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        values = rng.random(150) if graded else (rng.random(150) < 0.5).astype(float)
        score = Score.of(values)
        hits += score.low <= 0.5 <= score.high
    assert 89 <= hits <= 99


def test_a_perfect_score_is_not_certain() -> None:
    score = Score.of([1.0] * 20)
    assert score.mean == 1 and score.high == 1 and score.low == pytest.approx(0.8389, abs=1e-4)
    assert Score.of([0.0] * 20).high == pytest.approx(1 - 0.8389, abs=1e-4)


def test_answers_of_which_none_changed_are_no_proof_that_none_will() -> None:
    change = paired([1.0, 0.0] * 15, [1.0, 0.0] * 15)
    assert (change.difference, change.p_value) == (0, 1)
    assert change.high == -change.low == pytest.approx(1.96**2 / (30 + 1.96**2), abs=1e-4)
    assert "at most 11.35 points: too few examples" in verdict("custom", change)


def test_an_interval_holds_its_own_share() -> None:
    for total in range(1, 200):  # rounding would leave 1 - 2e-16 above some of 1
        assert wilson(total, total)[1] == 1
        assert wilson(0, total)[0] == 0


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = wilson(9666, 9673)
    assert (round(low, 4), round(high, 4)) == (0.9985, 0.9996)


def test_the_same_scores_give_the_same_interval() -> None:
    values = np.random.default_rng(3).random(50)
    assert Score.of(values) == Score.of(values)


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0]]])
def test_scores_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite"):
        Score.of(values)


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (1, 9, 22 / 1024), (9, 1, 22 / 1024)]
)
def test_mcnemars_test_is_exact(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p)


def test_pairs_count_what_flipped_and_the_difference() -> None:
    old, new = [1.0] * 90 + [0.0] * 10, [1.0] * 80 + [0.0] * 10 + [1.0] * 1 + [0.0] * 9
    change = paired(old, new)
    assert (change.n, change.better, change.worse, change.test) == (100, 1, 10, "McNemar")
    assert change.difference == pytest.approx(-0.09) and change.low < -0.09 < change.high < 0
    assert change.significant and change.p_value == pytest.approx(mcnemar(1, 10))


def test_a_paired_test_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(300)  # some examples are hard for both
    old, new = hard, np.clip(hard - 0.02 + 0.01 * rng.standard_normal(300), 0, 1)
    change = paired(old, new)
    assert Score.of(old).low < Score.of(new).high  # the intervals overlap
    assert change.test == "paired bootstrap" and change.significant and change.high < 0


def test_graded_scores_without_a_difference_are_rarely_called_different() -> None:
    rng = np.random.default_rng(5)
    called = sum(paired(scores := rng.random(80), scores + rng.normal(0, 0.1, 80)).significant for _ in range(100))
    assert called <= 12


def test_equal_scores_do_not_differ() -> None:
    assert paired([0.5, 0.7], [0.5, 0.7]).p_value == 1
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("chartqa", Paired(2500, -0.003, -0.005, -0.001, 0.01, "McNemar", 1, 9), "within the ±0.4 points"),
        ("chartqa", Paired(2500, -0.009, -0.012, -0.006, 0.001, "McNemar", 1, 9), "worse by 0.90 points"),
        ("chartqa", Paired(2500, -0.009, -0.012, -0.006, 0.001, "McNemar", 1, 9), "more than the ±0.4 points"),
        ("docvqa", Paired(5349, 0.012, 0.01, 0.014, 0.001, "paired bootstrap", 9, 1), "within the ±1.5 points"),
        ("mmmu", Paired(900, 0.001, -0.012, 0.014, 0.9, "McNemar", 5, 4), "at most 1.40 points: less than the ±1.5"),
        ("mmmu", Paired(20, 0.05, -0.1, 0.2, 0.6, "McNemar", 2, 1), "too few examples to say more"),
    ],
)
def test_a_verdict_knows_what_wording_alone_does(task: str, change: Paired, said: str) -> None:
    assert said in verdict(task, change)


def test_a_verdict_says_whose_wordings_it_knows() -> None:
    change = Paired(2500, -0.003, -0.005, -0.001, 0.01, "McNemar", 1, 9)
    assert "makes (as the paper saw over ten prompts)" in verdict("chartqa", change)
    assert "makes (the most that the paper saw, elsewhere)" in verdict("docvqa", change)


@pytest.mark.parametrize(("changes", "least"), [((0.3,), 1.0), ((0.3, 0.31), 0.5), ((0.3, 0.31, 0.29, 0.3), 0.125)])
def test_few_changes_are_never_surer_than_as_many_tosses_of_a_coin(changes: tuple[float, ...], least: float) -> None:
    old = [5.0] * 40
    new = [5 + change for change in changes] + [5.0] * (40 - len(changes))
    assert paired(old, new).p_value >= least
    alone = paired(old[: len(changes)], new[: len(changes)])
    assert alone.p_value >= least
    assert not alone.significant


def test_one_example_has_no_interval_but_a_known_one() -> None:
    assert not Score.of([2.5]).has_interval
    assert not paired([2.5], [2.6]).has_interval
    assert Score.of([1.0]).has_interval  # Wilson's
    assert Score.of([2.5, 2.6]).has_interval


@pytest.mark.parametrize(("old", "new"), [(1.0, 0.0), (0.0, 1.0), (0.4, 0.4)])
def test_a_change_that_all_examples_share_is_not_certain(old: float, new: float) -> None:
    change = paired([old] * 4, [new] * 4)
    assert change.low <= change.difference <= change.high
    least, most = wilson(4, 4) if old != new else (0.0, wilson(0, 4)[1])
    assert change.high - change.low == pytest.approx(most - least if old != new else 2 * most)
    assert not paired([8.0] * 4, [8.0] * 4).has_interval  # ratings have no such bound
