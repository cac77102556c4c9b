"""What each benchmark asks, from rows as they are published: prompts byte for byte, images in their places."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from demo_bundles import easy_vqa_data
from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import Example, RowError
from pixtral_runtime.evaluation.tasks.registry import TASKS

SHA256 = {
    "chartqa": "a7d40aef32daf796495ab0140378ddc0407204f671eb5ae74bba67c63c2a519c",
    "docvqa": "c0525726b5f8551852d97e2e9914c289cf81dc22d8b31a5b1cac0e747b2c34fe",
    "mathvista": "4d9af97182017ad2db3e63b626fb8d620bf249cfaeed00faee5c8afe87fe130f",
    "mmmu": "4d9af97182017ad2db3e63b626fb8d620bf249cfaeed00faee5c8afe87fe130f",
    "vqav2": "b45d5de911fe59cf9e191d4c14fb5e6d71a87e2662ed252502e3e8624f099882",
    "judge_system": "7d02a0fe7656157b68269a5915bc56d67c0d04648ed413545cc8b612635c2eb8",
}
LIMITS = {"vqav2": 10, "docvqa": 10, "chartqa": 2048, "mathvista": 2048, "mmmu": 2048, "mm_mt_bench": 4096}


def save(image: object) -> Path:
    """A path named as the row says, instead of a file."""
    if image is None:
        raise RowError("there is no image")
    return Path(str(image))


def made(task: str, row: dict[str, Any], number: int = 5) -> list[Example]:
    return TASKS[task].examples(row, number, save)


def only(task: str, row: dict[str, Any]) -> Example:
    (example,) = made(task, row)
    return example


def test_prompts_are_those_of_the_specification() -> None:
    assert {name: sha256(text.encode()).hexdigest() for name, text in PROMPTS.items()} == SHA256


def test_tasks_have_the_papers_limits() -> None:
    assert {name: TASKS[name].max_new_tokens for name in LIMITS} == LIMITS


def test_vqav2_has_ten_peoples_answers_as_dictionaries() -> None:
    said = [{"answer": "yes" if n else "no", "answer_confidence": "maybe", "answer_id": n} for n in range(10)]
    row = {"image": "a.jpg", "question": "Is it?", "answers": said, "question_id": 7, "answer_type": "yes/no"}
    example = only("vqav2", row)
    assert (example.id, example.group, example.references) == ("7", "yes/no", ("no", *["yes"] * 9))
    assert example.messages[0].content == (Path("a.jpg"), "Is it?\n" + PROMPTS["vqav2"])
    assert only("vqav2", row | {"answers": ["a", "b"]}).references == ("a", "b")


def test_docvqa_and_chartqa_ask_below_the_picture() -> None:
    example = only("docvqa", {"questionId": "49153", "image": "a.png", "question": "What?", "answers": ["0.28", "28"]})
    assert (example.id, example.references) == ("49153", ("0.28", "28"))
    assert example.messages[0].content == (Path("a.png"), "What?\n" + PROMPTS["docvqa"])
    chart = only("chartqa", {"type": "human_test", "image": "c.png", "question": "How many?", "answer": "14"})
    assert (chart.id, chart.group, chart.references) == ("5", "human_test", ("14",))
    assert chart.question == "How many?\n" + PROMPTS["chartqa"]


def test_mathvista_answers_by_letter_where_there_are_choices() -> None:
    row: dict[str, Any] = {"pid": "12", "decoded_image": "m.png", "query": "Hint: …\nChoices:\n(A) 3\n(B) 4"}
    row |= {"choices": ["3", "4"], "answer": "4", "question_type": "multi_choice", "precision": None}
    example = only("mathvista", row)
    assert (example.id, example.references, example.group) == ("12", ("B",), "multi_choice")
    assert example.question == row["query"] + "\n" + PROMPTS["mathvista"]
    assert example.details["choices"] == ["3", "4"] and example.details["answer"] == "4"
    free = only("mathvista", row | {"choices": None, "answer": "1.2", "precision": 1.0, "question_type": "free_form"})
    assert free.references == ("1.2",) and free.details["precision"] == 1 and not free.details["choices"]
    with pytest.raises(RowError, match="none of the choices"):
        made("mathvista", row | {"answer": "5"})


def test_mmmu_puts_images_where_the_question_names_them() -> None:
    row = {"id": "validation_Art_Theory_3", "question": "<image 1> Which of <image 2> fits?",
           "question_type": "multiple-choice", "options": "['<image 3>', 'the \\'left\\' one']", "answer": "B",
           "image_1": "1", "image_2": "2", "image_3": "3", "image_4": None}  # fmt: skip
    example = only("mmmu", row)
    assert example.messages[0].content == (
        Path("1"), " Which of ", Path("2"), " fits?\nA. ", Path("3"), "\nB. the 'left' one\n" + PROMPTS["mmmu"],
    )  # fmt: skip
    assert (example.references, example.group) == (("B",), "Art_Theory")
    last = only("mmmu", row | {"question": "See <image 1>", "question_type": "open", "answer": "['x', '7']"})
    assert last.messages[0].content == ("See ", Path("1"), PROMPTS["mmmu"])  # no line break before the prompt
    assert last.references == ("x", "7")
    with pytest.raises(RowError, match="no image"):
        made("mmmu", row | {"question": "<image 4>"})
    with pytest.raises(RowError, match="options is no list"):
        made("mmmu", row | {"options": "[open"})


def test_mm_mt_bench_asks_each_turn_after_the_references_of_those_before() -> None:
    said = [("user", "What is it?"), ("assistant", "A plot."), ("user", "Of what?"), ("assistant", "Rain.")]
    chunks = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    for first in ("What is it?", chunks):
        talk = [{"role": role, "content": text} for role, text in said]
        talk[0]["content"] = first  # type: ignore[assignment]
        one, two = made("mm_mt_bench", {"image": "p.png", "conversation": json.dumps(talk), "category": "charts"})
        assert (one.id, two.id, two.group) == ("5.1", "5.2", "charts")
        assert one.messages[0].content == (Path("p.png"), "What is it?") and one.references == ("A plot.",)
        assert [message.role for message in two.messages] == ["user", "assistant", "user"]
        assert [message.content for message in two.messages[1:]] == [("A plot.",), ("Of what?",)]
        assert two.references == ("Rain.",)
        assert two.details == {"conversation": 5, "turn": 2, "turns": 2}


@pytest.mark.parametrize("talk", ["", "{", "[]", '[{"role": "user", "content": "x"}]', "[1, 2]", '["a", "b"]'])
def test_conversations_that_are_none_are_broken_rows(talk: str) -> None:
    with pytest.raises(RowError, match="conversation"):
        made("mm_mt_bench", {"image": "p.png", "conversation": talk})


def test_custom_rows_may_have_several_images_a_metric_and_a_group() -> None:
    row = {"images": ["a", "b"], "question": "Same?", "answers": "yes", "metric": "anls", "group": "pairs", "id": "p1"}
    example = only("custom", row)
    assert (example.id, example.group, example.metric, example.references) == ("p1", "pairs", "anls", ("yes",))
    assert example.messages[0].content == (Path("a"), Path("b"), "Same?")
    assert only("custom", {"question": "2 + 2?", "answer": 4}).references == ("4",)
    with pytest.raises(RowError, match="no metric 'bleu'"):
        made("custom", row | {"metric": "bleu"})


@pytest.mark.parametrize("task", ["vqav2", "docvqa", "chartqa", "mathvista", "mmmu", "easy_vqa", "custom"])
@pytest.mark.parametrize(
    "row", [{}, {"image": "a", "decoded_image": "a", "question": 3}, {"question": "q", "query": "q"}]
)
def test_rows_without_what_a_task_needs_are_broken_rows(task: str, row: dict[str, Any]) -> None:
    with pytest.raises(RowError):
        made(task, row)


def test_easy_vqa_is_read_from_its_package() -> None:
    data = easy_vqa_data()
    for folder in (data, data / "test"):
        found, broken = read_examples(TASKS["easy_vqa"], folder, ImageStore(folder / "unused", folder), None)
        assert len(found) == 9673 and not broken
        assert {example.group for example in found} == {"color", "shape", "yes/no"}
        assert found[0].question == "what is the red shape?" and found[0].references == ("triangle",)
