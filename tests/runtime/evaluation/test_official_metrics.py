"""The benchmarks' own metrics, against what their papers and pages say of them."""

from __future__ import annotations

from typing import Any

import pytest

from pixtral_runtime.evaluation.answer_text import edit_distance
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.official_metrics import normalized
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import user_message


def score(metric: str, answer: str, *references: str, **details: Any) -> float:
    return METRICS[metric](answer, Example("1", user_message("question", []), references, details=details))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Dog", "dog"),
        ("a cat and an owl", "cat and owl"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs.", "10 dogs"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("lets", "lets"),  # not mended: could be another word
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("black / white", "black white"),
        ("t-shirt - red", "tshirt red"),  # a mark that is beside a space once goes everywhere
        ("2.5", "2.5"),
        ("2.", "2"),
        ("p.m.", "pm"),
        ("yes!\n", "yes"),
        ("?", ""),
    ],
)
def test_answers_are_normalized_as_vqa_says(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    "same, expected",
    # leaving out one that agrees (k of 10 times) leaves k - 1 of 3, else k of 3
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_vqa_accuracy_is_the_mean_over_all_but_one_person(same: int, expected: float) -> None:
    assert score("vqa_accuracy", "yes", *["yes"] * same, *["no"] * (10 - same)) == pytest.approx(expected)


def test_vqa_accuracy_does_not_see_case_articles_and_number_words_on_either_side() -> None:
    assert score("vqa_accuracy", "Yes.", *["yes"] * 10) == 1
    assert score("vqa_accuracy", "The two dogs", *["2 dogs"] * 4, *["2 dog"] * 6) == 1
    assert score("vqa_accuracy", "2", *["two"] * 5, *["Two."] * 5) == 1


@pytest.mark.parametrize(
    "references, expected",
    [(["yes"], 1), (["no"], 0), (["yes", "no"], 0.5), (["yes", "yes"], 1), (["yes", "yes", "no"], 2 / 3)],
)
def test_vqa_accuracy_of_fewer_people_asks_all_the_others(references: list[str], expected: float) -> None:
    assert score("vqa_accuracy", "yes", *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("PARIS", "Paris", 1),
        ("new  yorl", "New York", 8 / 9),  # one off; the longer length counts both spaces
        ("Paris.", "Paris", 5 / 6),  # punctuation counts, unlike in mistral-evals
        ("abcd", "abxy", 0.5),
        ("abcde", "abxyz", 0),  # 0.4
        ("Paris, France", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_anls_of_docvqa_is_0_below_one_half(answer: str, reference: str, expected: float) -> None:
    assert score("anls", answer, reference) == pytest.approx(expected)


def test_anls_takes_the_nearest_reference() -> None:
    assert score("anls", "12 May", "nothing alike", "13 May") == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    "one, other, expected",
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("ab", "ba", 2), ("flaw", "lawn", 2)],
)
def test_edit_distances_are_levenshteins(one: str, other: str, expected: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == expected


@pytest.mark.parametrize(
    "final, expected",
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("**B**", 1),
        ("B.", 1),
        ("B. Both", 1),
        ("(B) Both", 1),
        ("B: Both", 1),
        ("B and C", 0),  # relaxed correctness takes it for B
        ("Both", 0),
        ("b.c. 12", 0),
        ("A", 0),
        ("", 0),
    ],
)
def test_a_choice_must_be_the_very_letter(final: str, expected: int) -> None:
    assert score("exact_choice", f"Because of 2.\nFinal Answer: {final}", "B") == expected


@pytest.mark.parametrize(
    "final, reference, precision, expected",
    [
        ("6.0", "6", None, 1),
        ("1,000", "1000", None, 1),
        ("$5", "5", None, 1),
        ("12.", "12", None, 1),
        ("**12**", "12", None, 1),
        ("105", "100", None, 0),  # within the 5 % of relaxed correctness
        ("3.14159", "3.14", None, 0),
        ("3.14159", "3.14", 2.0, 1),
        ("3.15", "3.14", 2.0, 0),
        ("3.14159", "3.14", float("nan"), 0),  # what a table has for no precision
        ("Blue.", "blue", None, 1),
        ('"light  blue"', "light blue", None, 1),
        ("[1, 2]", "[1, 2]", 1.0, 1),
        ("[2, 1]", "[1, 2]", 1.0, 0),
        ("five", "5", None, 0),
    ],
)
def test_a_number_or_phrase_must_be_the_very_one(
    final: str, reference: str, precision: float | None, expected: int
) -> None:
    assert score("exact_choice", f"Final Answer: {final}", reference, precision=precision) == expected


def test_an_exact_choice_without_a_final_answer_is_wrong() -> None:
    assert score("exact_choice", "B", "B") == 0
    assert score("exact_choice", "Answer: 4", "5", "4") == 1


@pytest.mark.parametrize("answer, expected", [("Yes", 1), (" yes\n", 1), ("yes.", 0), ("no", 0), ("", 0)])
def test_exact_is_the_same_text_whatever_its_case(answer: str, expected: int) -> None:
    assert score("exact", answer, "yes") == expected
