"""MMMU's, MathVista's and ChartQA's own scores, against what their authors' scripts said of the same answers."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from helpers.places import DATA
from pixtral_runtime.evaluation.author_metrics import mathvista_prediction, mmmu_choice, mmmu_values
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import user_message

RECORDED: list[list[Any]] = [
    json.loads(line) for line in gzip.decompress((DATA / "official_scores.jsonl.gz").read_bytes()).splitlines()
]
"""Metric, answer, references, choices or null, what the script found, its score. tests/data/README.md says whose."""


def score(metric: str, answer: str, /, *references: str, **details: Any) -> float:
    return METRICS[metric](answer, Example("1", user_message("question", []), references, details=details))


def details_of(metric: str, choices: list[str] | None, found: Any) -> dict[str, Any]:
    details: dict[str, Any] = {"choices": choices or [], "question_type": "multiple-choice" if choices else "open"}
    if metric == "mathvista":
        details |= {"answer_type": found[0], "precision": found[1]}
    return details


@pytest.mark.parametrize(("metric", "least"), [("mmmu", 1600), ("mathvista", 700), ("chartqa_relaxed", 700)])
def test_every_recorded_answer_gets_the_score_of_the_authors_script(metric: str, least: int) -> None:
    rows = [row for row in RECORDED if row[0] == metric]
    assert len(rows) >= least and {row[5] for row in rows} == {0, 1}
    others = [
        (answer, references, choices, expected)
        for _, answer, references, choices, found, expected in rows
        if score(metric, answer, *references, **details_of(metric, choices, found)) != expected
    ]
    assert not others


def test_what_is_found_in_an_answer_is_what_the_scripts_find() -> None:
    for metric, answer, _, choices, found, _ in RECORDED:
        if metric == "mathvista":
            assert mathvista_prediction(answer, choices or [], found[0], found[1]) == found[2], answer
        elif metric == "mmmu" and choices:
            assert mmmu_choice(answer, choices) == found, answer  # None where the script draws a letter
        elif metric == "mmmu":
            assert sorted(map(str, mmmu_values(answer))) == found, answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("Option B", 1),
        ("The answer is B", 1),
        ("The answer is (B) two.", 1),
        ("Final Answer: B", 1),
        ("Not A but B is right", 1),
        ("The picture shows a dog, not one, but two", 1),  # by the choice's text, in more than five words
        ("two", 0),
        ("B, two", 0),  # no blank behind the letter
        ("b", 0),
        ("B or A", 0),  # the last counts
        ("", 0),
    ],
)
def test_mmmu_takes_the_last_letter_that_an_answer_names(answer: str, expected: int) -> None:
    assert score("mmmu", answer, "B", choices=["one", "two", "three"]) == expected


@pytest.mark.parametrize("answer", ["A", "(A)", "A.", "Option A", "**A**, or rather (A)", "The answer is A"])
def test_letters_alone_are_enough_for_questions_of_ones_own(answer: str) -> None:
    assert score("mmmu", answer, "A") == 1 and score("mmmu", answer, "B") == 0
    assert score("mathvista", "net", "net") == 1 and score("mathvista", "net", "rope") == 0


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("x = 3.149, so the result is 3.15", ["3.15"], 1),
        ("The area is 1,000 cm.", ["1000", "one thousand"], 1),
        ("It is 3.1", ["3.15"], 0),
        ("a deep Blue sea", ["blue"], 1),
        ("axb", ["x"], 0),  # a single letter needs a blank beside it
        ("an x too", ["x"], 1),
        ("", ["5"], 0),
    ],
)
def test_mmmu_without_choices_looks_at_the_ends_of_lines(answer: str, references: list[str], expected: int) -> None:
    assert score("mmmu", answer, *references) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A plot.\nFinal Answer: B", 1), ("**Final Answer:** (B)", 1), ("Final Answer: nets", 1), ("Final Answer: A", 0)],
)
def test_mathvistas_question_to_gpt_is_answered_by_the_final_answer(answer: str, expected: int) -> None:
    known = {"choices": ["rope", "net"], "answer": "net", "answer_type": "text"}
    assert score("mathvista", answer, "B", final_answer=True, **known) == expected
    assert score("mathvista", "Final Answer: A", "B", **known) == 1  # nothing found: the shortest choice


@pytest.mark.parametrize(
    ("answer", "reference", "known", "expected"),
    [
        ("Final Answer: 3.14159", "3.14", {"answer_type": "float", "precision": 2.0}, 1),
        ("Final Answer: 3.1", "3.14", {"answer_type": "float", "precision": 2}, 0),
        ("Final Answer: 12.0", "12", {"answer_type": "integer"}, 1),
        ("Final Answer: 12 cm", "12", {"answer_type": "integer"}, 0),
        ("**Final Answer: [1, 2]**", "[1, 2]", {"answer_type": "list"}, 1),
        ("Final Answer: one", "one", {}, 1),
    ],
)
def test_mathvista_compares_numbers_as_they_are_written(
    answer: str, reference: str, known: dict[str, Any], expected: int
) -> None:
    assert score("mathvista", answer, reference, final_answer=True, **known) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [("Bars.\nFinal Answer: 10.4", "10", 1), ("10.6", "10", 0), ("**Final Answer: 25%**", "0.25", 1), ("NO", "No", 1)],
)
def test_chartqas_own_score_is_of_the_final_answer_where_the_prompt_asks_for_one(
    answer: str, reference: str, expected: int
) -> None:
    assert score("chartqa_relaxed", answer, reference, final_answer=True) == expected
    assert score("chartqa_relaxed", f"Final Answer: {reference}", reference) == 0  # the text as a whole
