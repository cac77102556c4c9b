"""Results of evaluations: what is scored, what is missing, what a comparison pairs, and what a page shows first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.comparison import compare_evaluations
from pixtral_runtime.evaluation.page import evaluation_page
from pixtral_runtime.evaluation.result import (
    Evaluation,
    Scored,
    read_evaluation,
    requests_of,
    score_answers,
    score_ratings,
)
from pixtral_runtime.evaluation.task import BrokenRow, Example, Task
from pixtral_runtime.inputs.conversation import user_message

TASK = Task("custom", "", "", "", 16, ("exact",), (), lambda row, number, save: [])


def example(name: str, reference: str = "yes", group: str = "", metric: str | None = None) -> Example:
    return Example(name, user_message(f"question {name}", [Path("a.png")]), (reference,), group, metric)


def record(name: str, answer: str | None, error: str | None = None) -> Record:
    return Record(name, "q", "0" * 16, answer=answer, finish_reason=None if error else "stop", error=error)


def by_id(*records: Record) -> dict[str, Record]:
    return {one.id: one for one in records}


def scored(name: str, score: float | None, answer: str = "yes", **changes: Any) -> Scored:
    scores = {} if score is None else {"exact": score}
    return Scored(name, f"question {name}", ("yes",), answer=answer, scores=scores, **changes)


def evaluation(*examples: Scored, task: str = "custom", **setting: Any) -> Evaluation:
    return Evaluation(task, {"bundle": "b"} | setting, examples)


def test_answers_are_scored_and_what_has_none_says_why() -> None:
    examples = [example("a"), example("b"), example("c"), example("d")]
    records = by_id(record("a", "Yes "), record("b", "no"), record("c", None, "a.png is damaged"))
    result = Evaluation("custom", {}, score_answers(TASK, examples, records), [BrokenRow("7", "no question")])
    assert [one.score for one in result.examples] == [1, 0, None, None]
    assert (len(result.scored), result.rows, result.scores["exact"].n) == (2, 5, 2)
    assert result.scores["exact"].mean == 0.5
    assert result.missing == [("7", "no question"), ("c", "a.png is damaged"), ("d", "not answered")]


def test_an_empty_answer_is_wrong_and_not_missing() -> None:
    (only,) = score_answers(TASK, [example("a")], by_id(record("a", "")))
    assert (only.score, only.error) == (0, None)


def test_examples_with_metrics_of_their_own_are_scored_by_them() -> None:
    examples = [example("a", "paris", metric="anls"), example("b")]
    result = evaluation(*score_answers(TASK, examples, by_id(record("a", "Paris"), record("b", "yes"))))
    assert {name: (score.mean, score.n) for name, score in result.scores.items()} == {"anls": (1, 1), "exact": (1, 1)}
    assert result.headline == "anls and exact"


def test_groups_have_scores_of_their_own() -> None:
    examples = [example("a", group="human"), example("b", group="augmented"), example("c", group="human")]
    records = by_id(record("a", "no"), record("b", "yes"), record("c", "yes"))
    groups = evaluation(*score_answers(TASK, examples, records)).groups
    assert {name: (score.mean, score.n) for name, score in groups.items()} == {"augmented": (1, 1), "human": (0.5, 2)}


def test_turns_that_no_judge_rated_say_so() -> None:
    examples = [example("a"), example("b"), example("c"), example("d")]
    records = by_id(*(record(name, "x") for name in "abc"), record("d", None, "damaged"))
    rated = score_ratings(examples, records, {"a": (7.5, None), "b": (None, "no rating in 3 answers")})
    assert rated[0].scores == {"rating": 7.5}
    reasons = ["not rated: no rating in 3 answers", "not rated: the judge was not asked", "damaged"]
    assert [one.error for one in rated[1:]] == reasons


def test_a_saved_result_is_read_as_it_was(tmp_path: Path) -> None:
    before = Evaluation("custom", {"bundle": "b"}, [scored("a", 1.0), scored("b", None)], [BrokenRow("7", "bad")])
    before.save(tmp_path / "r.json")
    after = read_evaluation(tmp_path / "r.json")
    assert after == before and after.summary() == before.summary()


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", 5), ("examples", {}), ("examples", [{"id": "1", "question": 5, "references": []}]), ("setting", [])],
)
def test_a_result_with_another_type_is_refused(tmp_path: Path, field: str, value: object) -> None:
    data = {"schema": 1, "task": "x", "setting": {}, "examples": [], "broken_rows": []}
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert read_evaluation(tmp_path / "r.json").examples == []
    (tmp_path / "r.json").write_text(json.dumps(data | {field: value}))
    with pytest.raises(InputError, match=f"is no result of an evaluation: {field}"):
        read_evaluation(tmp_path / "r.json")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 99}', '{"schema": 1, "task": "x"}', None])
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_evaluation(path)
    assert error.value.hint


def test_a_comparison_pairs_by_id_and_lists_what_flipped() -> None:
    old = evaluation(scored("a", 1.0), scored("b", 1.0), scored("c", 0.0, "no"), scored("d", None), scored("e", 1.0))
    new = evaluation(scored("c", 1.0), scored("b", 0.0, "no"), scored("a", 1.0), scored("d", 1.0))
    found = compare_evaluations(old, new)
    assert (found.changes["exact"].n, found.changes["exact"].better, found.changes["exact"].worse) == (3, 1, 1)
    assert [(flip.id, flip.old_answer, flip.new_answer) for flip in found.flips] == [
        ("c", "no", "yes"),
        ("b", "yes", "no"),
    ]
    assert found.unpaired == 2 and not found.regressed
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == found.verdict


def test_a_bundle_that_is_worse_beyond_wording_has_regressed_and_a_better_one_has_not() -> None:
    good = evaluation(*(scored(str(n), 1.0) for n in range(100)))
    bad = evaluation(*(scored(str(n), float(n >= 20), "no") for n in range(100)))
    assert compare_evaluations(good, bad).regressed and not compare_evaluations(bad, good).regressed
    assert "worse by 20.00 points" in compare_evaluations(good, bad).verdict


def test_a_small_but_sure_loss_is_within_the_wording() -> None:
    good = evaluation(*(scored(str(n), 1.0) for n in range(1000)))
    bad = evaluation(*(scored(str(n), float(n >= 10), "no") for n in range(1000)))
    found = compare_evaluations(good, bad)
    assert found.changes["exact"].significant and not found.regressed and "within" in found.verdict


def test_ratings_are_compared_on_their_own_scale() -> None:
    def rated(shift: float) -> Evaluation:
        each = [Scored(str(n), "q", ("r",), scores={"rating": n % 5 + shift}) for n in range(40)]
        return Evaluation("mm_mt_bench", {}, each)

    found = compare_evaluations(rated(2), rated(1))
    assert found.verdict.startswith("worse by 1.00 of 10") and found.regressed


@pytest.mark.parametrize(
    ("old", "word"),
    [
        (evaluation(scored("a", 1.0), task="docvqa"), "docvqa"),
        (evaluation(scored("b", 1.0)), "in common"),
        (evaluation(Scored("a", "question a", ("no",), scores={"exact": 1.0})), "other references"),
    ],
)
def test_evaluations_of_different_questions_are_not_compared(old: Evaluation, word: str) -> None:
    with pytest.raises(InputError, match=word):
        compare_evaluations(old, evaluation(scored("a", 1.0)))


def test_the_page_shows_errors_then_flips_then_wrong_answers() -> None:
    names = ["right", "wrong", "flipped", "broken"]
    old = evaluation(*(scored(name, 1.0) for name in names[2:]), scored("right", 1.0), scored("wrong", 0.0))
    new = evaluation(scored("right", 1.0), scored("wrong", 0.0), scored("flipped", 0.0, "no"), scored("broken", None))
    records = by_id(*(record(name, "x") for name in names))
    shown, notes, summary = evaluation_page(new, compare_evaluations(old, new), records)
    assert [one.id for one in shown] == ["broken", "flipped", "wrong", "right"]
    assert notes["flipped"].marks == ("wrong", "worse than the other")
    assert ("reference", "yes") in notes["right"].lines and ("the other's answer", "yes (score 1)") in notes[
        "flipped"
    ].lines
    assert summary["scored"] == "3 of 4" and "no difference" in str(summary["against the other"])


def test_requests_have_the_tasks_limit() -> None:
    (only,) = requests_of([example("a")], 10)
    assert (only.id, only.max_new_tokens, only.images) == ("a", 10, (Path("a.png"),))
