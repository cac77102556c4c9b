"""Metrics of mistral-evals and the paper's levels, against the gold cases of specification section 5.4."""

from __future__ import annotations

import pytest

from pixtral_runtime.evaluation.metrics import METRICS, OF_THEIR_TASK
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.inputs.conversation import user_message

NAMES = {
    *("mistral_vqa_match", "mistral_anls", "relaxed_correctness", "baseline", "level_1", "level_2", "level_3"),
    *("vqa_accuracy", "anls", "exact_choice", "exact", "mmmu", "mathvista", "chartqa_relaxed"),
    *("nats_per_token", "bits_per_byte", "mmlu", "gsm8k_strict", "gsm8k_flexible", "math_equivalent"),
    *("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
}
LEVELS = ("baseline", "level_1", "level_2", "level_3")
GOLD = [  # answer, reference, explicit (level 2), anywhere (level 3)
    ("Final Answer: 6.0", "6", 1, 1),
    ("**Answer:** 6", "6", 1, 1),
    ("*Answer: 6*", "6", 1, 1),
    ("The answer is 6.", "6", 0, 1),
    ("6000", "6", 0, 1),
    ("so answer: D. Both", "D", 1, 1),
    ("Final Answer: B and C", "B", 1, 1),
    ("Final Answer: 105", "100", 1, 1),
    ("Final Answer: 105.1", "100", 0, 0),
    ("Final Answer: 5%", "0.05", 1, 1),
    ("Final Answer: 0.05", "5%", 1, 1),
    ("Final Answer: $1,000", "1000", 1, 1),
    ("Final Answer: Yes", "yes", 1, 1),
    ("Final Answer:\n\n  Blue", "blue", 1, 1),
    ("final answer: 2020", "2021", 1, 1),
    ("Final Answer: Two", "2", 0, 0),
    ("Final answer: 3 cm", "3", 0, 0),
    ("Final Answer: \\boxed{7}", "7", 0, 0),
    ("Final Answer: (A)", "A", 1, 1),
    ("Final Answer: 12.", "12", 1, 1),
    ("Final Answer: blue.", "blue", 0, 0),
    ("answer: x\nanswer: y", "y", 1, 1),
]


def score(metric: str, answer: str, *references: str) -> float:
    return METRICS[metric](answer, Example("1", user_message("question", []), references))


def test_every_metric_has_its_name() -> None:
    assert set(METRICS) == NAMES


@pytest.mark.parametrize("answer, reference, explicit, anywhere", GOLD)
def test_parsing_levels_2_and_3_give_the_gold_scores(answer: str, reference: str, explicit: int, anywhere: int) -> None:
    assert (score("level_2", answer, reference), score("level_3", answer, reference)) == (explicit, anywhere)


@pytest.mark.parametrize("answer, reference, _, __", GOLD)
def test_no_level_scores_less_than_a_stricter_one(answer: str, reference: str, _: int, __: int) -> None:
    scores = [score(level, answer, reference) for level in LEVELS]
    assert scores == sorted(scores)


@pytest.mark.parametrize(
    "answer, scores",
    [
        ("The chart shows 6 bars.\nFinal Answer: 6", (1, 1, 1, 1)),
        ("So, Final Answer: 6\n\n", (1, 1, 1, 1)),
        ("**Final Answer: 6**", (1, 1, 1, 1)),
        ("Answer: 6", (0, 1, 1, 1)),
        ("Final Answer: 6\nI hope this helps.", (0, 0, 1, 1)),
        ("**Final Answer**: 6", (0, 0, 1, 1)),
        ("**Answer:** 6", (0, 0, 1, 1)),
        ("Final Answer:\n6", (0, 0, 1, 1)),
        ("There are 6 bars.", (0, 0, 0, 1)),
        ("Answer: 7, or 6", (0, 0, 0, 0)),
        ("Final Answer:", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_each_level_reads_what_the_stricter_ones_do_not(answer: str, scores: tuple[int, ...]) -> None:
    assert tuple(score(level, answer, "6") for level in LEVELS) == scores


def test_letters_may_be_found_in_any_word_at_level_3_but_only_in_lower_case() -> None:
    assert score("level_3", "This is a dog", "A") == 1
    assert score("level_3", "The right one is A", "A") == 0
    assert score("level_3", "It is\n\nblue", "Blue") == 1


def test_numbers_are_found_with_and_without_commas_at_level_3() -> None:
    assert score("level_3", "about 12,345 people", "12345") == 1
    assert score("level_3", "about 12345 people", "12345.0") == 1
    assert score("level_3", "a share of 0.25", "0.25") == 1
    assert score("level_3", "about 12 345 people", "12345") == 0


def test_a_wrong_final_answer_is_not_saved_by_level_3() -> None:
    assert score("level_3", "It is 6, or 7. Final Answer: 7", "6") == 0


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("50%", "50", 1),
        ("50%", "0.5", 1),
        ("0.5", "50", 0),  # no percent sign, no conversion
        ("50", "0.5", 0),
        ("$1,234.5", "1234.5", 1),
        ("2 apples", "2", 0),
        ("'Yes'", "yes", 1),
        ("Yes.", "yes", 0),
        ("Bright", "B", 1),
        ("", "B", 0),
        (" yes\n", "yes", 1),
        ("infinity", "Infinity", 1),  # words that Python would read as numbers
        ("nan", "1", 0),
    ],
)
def test_relaxed_correctness_of_an_answer_as_it_is(answer: str, reference: str, expected: int) -> None:
    assert score("relaxed_correctness", answer, reference) == expected


def test_any_reference_will_do() -> None:
    assert score("relaxed_correctness", "b", "a cat", "b") == 1
    assert score("level_2", "answer: 7", "six", "7", "8") == 1
    assert score("mistral_anls", "paris", "London", "Paris") == 1


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("paris", "Paris", 1),
        ("Paris.", "paris", 1),
        ("The  answer", "the answer", 1),
        ("Paris, France", "Paris", 0.3846),
        ("xyz", "Paris", 0),
        ("", "Paris", 0),
        ("", "", 1),
        ("10 %", "10%", 0.75),
    ],
)
def test_anls_of_mistral_evals_gives_the_gold_scores(answer: str, reference: str, expected: float) -> None:
    assert score("mistral_anls", answer, reference) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("yes", ["yes"] * 10, 1),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6667),
        ("Yes", ["yes"] * 10, 0),
        ('"yes"', ["yes"] * 3, 1),
        ("yes", ["'yes'"] * 3, 1),
        ("yes", ["yes"], 0.3333),
        ("", ["yes"] * 10, 0),
    ],
)
def test_vqa_match_of_mistral_evals_gives_the_gold_scores(answer: str, references: list[str], expected: float) -> None:
    assert score("mistral_vqa_match", answer, *references) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("metric", sorted(NAMES - OF_THEIR_TASK))
@pytest.mark.parametrize(
    "answer", ["", " ", "\n", "answer:", "**", "%", '"', "5%%", "İ answer: é", "answer: _ ", "1e999"]
)
def test_any_text_has_a_score_from_0_to_1(metric: str, answer: str) -> None:
    for references in [("",), ("A",), ("5",), ("inf",), ('"',), ("a", "1", "[1, 2]"), ()]:
        assert 0 <= score(metric, answer, *references) <= 1
