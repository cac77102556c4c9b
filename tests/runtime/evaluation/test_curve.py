"""Curves over budgets of image tokens: what is compared with what, what is counted, what a saved one is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pixtral_runtime.batch.records import ImageInfo, Record
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.curve import Curve, CurvePoint, saved_budgets, saved_results
from pixtral_runtime.evaluation.curve_page import curve_page, curve_rows
from pixtral_runtime.evaluation.result import Evaluation, Scored

SETTING = {"bundle": "b", "fingerprint": "f", "precision": "int4", "dtype": "float16", "dataset": "d", "split": "",
           "max_image_side": None, "judge": None, "backend": "ort-cpu"}  # fmt: skip


def evaluation(scores: Mapping[str, float | None], metrics: Mapping[str, str] | None = None) -> Evaluation:
    names = metrics or {}
    examples = [
        Scored(
            name, f"question {name}", ("yes",), answer="yes" if score else "no",
            scores={} if score is None else {names.get(name, "exact"): score},
        )
        for name, score in scores.items()
    ]  # fmt: skip
    return Evaluation("custom", SETTING, examples)


def record(name: str, tokens: int, pictures: int = 1, seconds: float = 0.0, error: str | None = None) -> Record:
    answer = None if error else "yes"
    times = {"vision": 400 * seconds, "decode": 600 * seconds} if seconds else {}
    images = [ImageInfo(f"{name}.png") for _ in range(pictures)]
    return Record(name, "q", "0" * 16, images, answer=answer, image_tokens=tokens, times_ms=times, error=error)


def curve(*evaluations: Evaluation, budgets: tuple[int | None, ...] = (64, 256, None)) -> Curve:
    answered: list[tuple[Evaluation, Mapping[str, Record]]] = [
        (one, {example.id: record(example.id, 60 * (number + 1)) for example in one.examples})
        for number, one in enumerate(evaluations)
    ]
    return Curve.of(budgets[-len(evaluations) :], answered)


def test_a_picture_takes_the_tokens_of_its_example_by_its_pictures() -> None:
    records = {
        "a": record("a", 300, pictures=3),
        "b": record("b", 200),
        "c": record("c", 999, error="too large"),
        "elsewhere": record("elsewhere", 999),  # of an earlier run over more examples
    }
    point = CurvePoint(256, evaluation({"a": 1, "b": 0, "c": None}), records)
    assert point.mean_image_tokens == 125
    assert CurvePoint(256, evaluation({"a": None}), {}).mean_image_tokens is None


def test_answers_made_for_another_record_took_no_time_of_their_own() -> None:
    records = {"a": record("a", 1, seconds=2), "b": record("b", 1, seconds=4), "c": record("c", 1)}
    assert CurvePoint(None, evaluation({"a": 1, "b": 1, "c": 1}), records).seconds_per_answer == pytest.approx(3)
    assert CurvePoint(None, evaluation({"c": 1}), records).seconds_per_answer is None


def test_what_one_budget_did_not_score_is_not_compared() -> None:
    few = evaluation({"a": 0, "b": 1, "c": None})
    whole = evaluation({"a": 1, "b": 1, "c": 1})
    point = curve(few, whole).points[0]
    assert point.comparison is not None
    assert point.comparison.unpaired == 1
    assert point.comparison.changes["exact"].n == 2
    assert point.comparison.changes["exact"].difference == -0.5


def test_examples_of_several_metrics_give_one_score() -> None:
    metrics = {"a": "exact", "b": "anls"}
    made = curve(evaluation({"a": 0, "b": 0.5}, metrics), evaluation({"a": 1, "b": 1}, metrics))
    assert [row[2:5] for row in curve_rows(made)] == [
        ("25.00%", "0.00% to 50.00%", "2"),
        ("100.00%", "34.24% to 100.00%", "2"),
    ]
    assert made.headline == "exact and anls"


def test_a_budget_without_any_score_is_a_row_and_no_point() -> None:
    made = curve(evaluation({"a": None}), evaluation({"a": 1}), evaluation({"a": 1}))
    assert curve_rows(made)[0] == ("64", "60", "-", "-", "0", "", "", "", "", "")
    assert curve_page(made).count("<circle") == 2
    assert made.points[0].comparison is None


def test_the_page_shows_losses_first_and_at_most_fifty() -> None:
    names = [f"{number:03}" for number in range(60)]
    whole = evaluation({"gained": 0} | dict.fromkeys(names, 1))
    page = curve_page(curve(evaluation({"gained": 1} | dict.fromkeys(names, 0)), whole))
    assert "61 of 61 examples that both answered have another score; the first 50 are here" in page
    assert page.count('<td class="lost">') == 50
    assert "question gained" not in page


def test_a_saved_curve_names_the_results_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "float16.v2.json"
    made = curve(evaluation({"a": 0}), evaluation({"a": 1}))
    made.save(path)
    assert saved_budgets(path) == [256, None]
    found = saved_results(path, [256, None])
    assert [one.name for one in found] == ["float16.v2.256.json", "float16.v2.full.json"]
    with pytest.raises(InputError, match="no result with 64 image tokens") as refused:
        saved_results(path, [64, None])
    assert refused.value.remedies == (Option("image_tokens", "256,full"),)
    path.write_text(path.read_text().replace("256", "128"))
    assert saved_budgets(path) is None  # its seal is broken
