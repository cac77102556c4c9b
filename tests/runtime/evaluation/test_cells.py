"""Cells of the wrong type: read for what they plainly are, or the row is refused; never guessed, never a bug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixtral_runtime.evaluation.fields import is_own, items, label, number, texts
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.task import Example, RowError
from pixtral_runtime.evaluation.tasks.registry import TASKS

NAN = float("nan")
ROWS: dict[str, dict[str, Any]] = {
    "custom": {"image": "a.png", "question": "What?", "answers": ["x"]},
    "mathvista": {"pid": "1", "decoded_image": "a.png", "query": "Which?", "choices": ["circle", "square"],
                  "answer": "circle", "question_type": "multi_choice", "precision": None},
    "mmmu": {"id": "validation_Art_1", "question": "Which?", "options": "['circle', 'square']", "answer": "A",
             "question_type": "multiple-choice", "image_1": "a.png"},
    "vqav2": {"image": "a.png", "question": "What?", "answers": [{"answer": "net"}], "question_id": 7},
    "docvqa": {"image": "a.png", "question": "What?", "answers": ["net"], "questionId": "7"},
    "chartqa": {"image": "a.png", "query": "What?", "label": ["14"], "human_or_machine": 0},
    "easy_vqa": {"image": "a.png", "question": "What?", "answer": "yes"},
    "mm_mt_bench": {"image": "a.png", "category": "charts", "conversation":
                    [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Net."}]},
}  # fmt: skip


def made(task: str, **changes: Any) -> Example:
    (example,) = TASKS[task].examples(ROWS[task] | changes, 0, lambda image: Path(str(image)))
    return example


@pytest.mark.parametrize("task", ROWS)
def test_the_rows_as_they_are_make_an_example(task: str) -> None:
    assert made(task).images == (() if task == "mmmu" else (Path("a.png"),))


@pytest.mark.parametrize("written", ['["circle", "square"]', "['circle', 'square']", ["circle", "square"]])
def test_lists_that_were_stored_as_text_are_lists(written: object) -> None:
    assert made("mathvista", choices=written).references == ("A",)
    assert made("mathvista", choices=written, answer="square").details["choices"] == ["circle", "square"]
    assert made("mmmu", options=written).question.startswith("Which?\nA. circle\nB. square\n")
    assert made("custom", answers=written).references == ("circle", "square")
    assert made("custom", images=written).images == (Path("circle"), Path("square"))
    assert made("docvqa", answers=written).references == ("circle", "square")
    assert made("chartqa", label=written).references == ("circle", "square")


def test_people_that_were_stored_as_text_are_people() -> None:
    assert made("vqav2", answers="[{'answer': 'net', 'answer_id': 1}, {'answer': 'nets'}]").references == (
        "net",
        "nets",
    )
    assert made("vqav2", answers='["net"]').references == ("net",)
    assert made("mm_mt_bench", conversation=ROWS["mm_mt_bench"]["conversation"]).references == ("Net.",)


@pytest.mark.parametrize("column", ["choices", "options", "answers"])
@pytest.mark.parametrize(
    "written",
    [
        "['circle' 'square']",  # as NumPy writes it; Python reads one text
        "['circle'\n 'square']",
        "[circle, square]",
        "[",
        "['circle'",
        "[" * 9999,
        {"0": "circle"},
        True,
        b"circle",
        [["circle"]],
        [None, "circle"],
        '["\\ud800"]',  # half a character
        "['\\ud800']",
        [NAN],
    ],
)
def test_what_is_no_list_of_texts_is_refused(column: str, written: object) -> None:
    with pytest.raises(RowError):
        made({"choices": "mathvista", "options": "mmmu", "answers": "docvqa"}[column], **{column: written})


def test_a_text_that_is_no_list_is_not_searched_for_letters() -> None:
    with pytest.raises(RowError, match="choices is no list"):
        made("mathvista", choices="circle or square", answer="c")
    with pytest.raises(RowError, match="options is no list"):
        made("mmmu", options="circle")
    assert made("chartqa", label="[2013, 2015]").references == ("[2013, 2015]",)
    assert made("custom", answers="no list").references == ("no list",)
    assert TASKS["custom"].examples({"question": "?", "answer": "[0, 1)"}, 0, Path)[0].references == ("[0, 1)",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "changes", "word"),
    [
        ("custom", {"metric": ["anls"]}, "metric"),
        ("custom", {"metric": {"anls": 1}}, "metric"),
        ("custom", {"metric": 5}, "only mistral_vqa_match"),
        ("custom", {"metric": "bleu"}, "chartqa_relaxed"),
        ("custom", {"id": ["a"]}, "id"),
        ("custom", {"group": {"a": 1}}, "group"),
        ("custom", {"question": 7}, "question"),
        ("custom", {"answers": NAN}, "answers"),
        ("custom", {"answers": [float("inf")]}, "answers"),
        ("custom", {"answers": None}, "answers"),
        ("custom", {"choices": "a, b"}, "choices"),
        ("mathvista", {"precision": "much"}, "precision"),
        ("mathvista", {"precision": [1]}, "precision"),
        ("mathvista", {"precision": float("inf")}, "precision"),
        ("mathvista", {"choices": None}, "no choices"),
        ("mathvista", {"answer": None}, "answer"),
        ("mathvista", {"answer": ["circle"]}, "answer"),
        ("mathvista", {"answer": "triangle"}, "none of the choices"),
        ("mmmu", {"question_type": None}, "question_type"),
        ("mmmu", {"question_type": ["open"]}, "question_type"),
        ("mmmu", {"options": None}, "options"),
        ("mmmu", {"answer": "C"}, "none of the letters A, B"),
        ("mmmu", {"answer": "?"}, "none of the letters"),
        ("vqav2", {"question_id": {"a": 1}}, "question_id"),
        ("vqav2", {"answers": [{"said": "net"}]}, "answers"),
        ("chartqa", {"human_or_machine": [0]}, "human_or_machine"),
        ("mm_mt_bench", {"category": ["charts"]}, "category"),
        ("mm_mt_bench", {"conversation": '[{"role": "user", "role": "user"}]'}, "twice"),
        (
            "mm_mt_bench",
            {"conversation": [{"role": "user", "content": [{"type": "text", "text": None}]}] * 2},
            "message",
        ),
    ],
)
def test_a_cell_of_the_wrong_type_is_a_broken_row(task: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(RowError, match=word):
        made(task, **changes)


def test_empty_cells_of_tables_are_missing_values() -> None:
    free = {"choices": NAN, "question_type": "free_form", "answer": 1.5, "precision": "1.0"}
    example = made("mathvista", **free)
    assert (example.references, example.details["precision"], example.details["choices"]) == (("1.5",), 1, [])
    assert made("custom", id=NAN, group=NAN, metric=NAN).id == "0"
    assert made("custom", metric="").metric is None


def test_one_image_and_a_list_of_one_are_the_same() -> None:
    assert made("custom", image=["a.png"]).images == made("custom", images="a.png").images == (Path("a.png"),)
    assert made("custom", images=None).images == (Path("a.png"),)


def test_the_groups_of_chartqa_have_one_name_in_every_edition() -> None:
    kinds = {made("chartqa", human_or_machine=kind).group for kind in (0, "0", "human")}
    assert kinds == {"human_test"}
    assert (
        made("chartqa", human_or_machine=1).group
        == made("chartqa", human_or_machine="machine").group
        == "augmented_test"
    )


def test_a_question_of_ones_own_may_have_choices_for_the_benchmarks_metrics() -> None:
    example = made("custom", metric="mmmu", answers="B", choices=["one", "two"])
    assert METRICS["mmmu"]("The answer is (B)", example) == 1 and METRICS["mmmu"]("A", example) == 0
    example = made("custom", metric="mathvista", answers="two", choices='["one", "two"]')
    assert METRICS["mathvista"]('The answer is "(B)".', example) == 1


def test_values_have_the_types_that_they_should() -> None:
    row = {"a": 10**400, "b": "1e2", "c": "", "d": " 3 ", "e": True, "f": 2.0}
    assert label(row, "a") == str(10**400) and label(row, "f") == "2.0" and label(row, "none") == ""
    assert (number(row, "b"), number(row, "c"), number(row, "d")) == (100, None, 3)
    for name in ("a", "e"):
        with pytest.raises(RowError, match="no number"):
            number(row, name)
    assert texts(10**400, "x") == (str(10**400),) and items(" [1] ", "x") == [1] and items(None, "x") == []


def test_columns_of_results_are_told_from_those_of_questions() -> None:
    assert is_own(["id", "question", "asked", "images", "answer", "settings", "key"])
    assert is_own(["id", "key", "rating", "text", "attempts", "error"])
    assert is_own(["id", "image", "answer", "finish_reason", "new_tokens"])
    assert not is_own(["id", "asked", "settings", "answers"]) and not is_own(["id", "question", "answer", "rating"])
