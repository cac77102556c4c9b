"""Scores of text tasks against what the benchmarks' own programs gave for the same answers.

`tests/data/text_scores.json` holds answers made up for it, and what was computed of them by lm-evaluation-harness
0.4.13 (GSM8K, IFEval, NLTK for sentences and words) and by MATH's `math_equivalence.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.places import ROOT
from pixtral_runtime.evaluation.instructions import CHECKS, followed, followed_loosely
from pixtral_runtime.evaluation.math_answers import boxed, same_formula
from pixtral_runtime.evaluation.metrics import METRICS, WEIGHTS
from pixtral_runtime.evaluation.sentences import capital_words, count_sentences
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import user_message

GOLD: dict[str, Any] = json.loads((ROOT / "tests/data/text_scores.json").read_text(encoding="utf-8"))
IFEVAL = GOLD["ifeval"]


def example(*references: str, **details: Any) -> Example:
    return Example("a", user_message("?"), references, details=details)


@pytest.mark.parametrize(("one", "other", "same"), GOLD["math_same"])
def test_formulas_are_the_same_as_to_the_authors(one: str, other: str, same: bool) -> None:
    assert same_formula(one, other) == same_formula(other, one) == same


@pytest.mark.parametrize(("text", "formula"), GOLD["math_box"])
def test_the_last_box_is_that_of_the_authors(text: str, formula: str | None) -> None:
    assert boxed(text) == formula


def test_math_needs_a_box() -> None:
    score = METRICS["math_equivalent"]
    assert score("so $\\boxed{\\frac12}$.", example("\\frac{1}{2}")) == 1
    assert score("so it is \\frac{1}{2}", example("\\frac{1}{2}")) == 0


@pytest.mark.parametrize(("answer", "reference", "strict", "flexible"), GOLD["gsm8k"])
def test_gsm8k_is_scored_as_by_the_harness(answer: str, reference: str, strict: float, flexible: float) -> None:
    asked = example(reference)
    assert (METRICS["gsm8k_strict"](answer, asked), METRICS["gsm8k_flexible"](answer, asked)) == (strict, flexible)


def test_the_gold_cases_are_of_every_instruction_and_both_outcomes() -> None:
    assert {case["id"] for case in IFEVAL["cases"]} == set(CHECKS) and len(CHECKS) == 25
    for name in CHECKS:
        kept = [len(case["strict"]) for case in IFEVAL["cases"] if case["id"] == name]
        assert 0 < sum(kept) < len(kept) * len(IFEVAL["answers"]), name


@pytest.mark.parametrize("case", IFEVAL["cases"], ids=lambda case: case["id"])
def test_instructions_are_checked_as_by_the_authors(case: dict[str, Any]) -> None:
    told = {"id": case["id"], **case["kwargs"]}
    answers = IFEVAL["answers"]
    assert [name for name, text in answers.items() if followed(told, text)] == case["strict"]
    assert [name for name, text in answers.items() if followed_loosely(told, text)] == case["loose"]


@pytest.mark.parametrize(("text", "count"), GOLD["sentences"])
def test_sentences_are_counted_as_nltk_counts_them(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(("text", "count"), GOLD["capitals"])
def test_words_in_capitals_are_counted_as_nltk_counts_them(text: str, count: int) -> None:
    assert capital_words(text) == count


def test_ifeval_has_four_scores_two_of_them_by_instruction() -> None:
    comma, title = {"id": "punctuation:no_comma"}, {"id": "detectable_format:title"}
    asked = example(instructions=[comma, title])
    names = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
    assert [METRICS[name]("Sure, here:\n<<A title>>", asked) for name in names] == [0, 0.5, 1, 1]
    assert [name for name in names if name in WEIGHTS] == ["instruction_strict", "instruction_loose"]
    assert WEIGHTS["instruction_loose"]("", asked) == 2
