"""Datasets in their authors' own files, written field by field as they publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import BrokenRow, Example
from pixtral_runtime.evaluation.tasks.registry import TASKS

MATHVISTA_METADATA = {
    "split": "testmini", "language": "english", "img_width": 1024, "img_height": 768, "source": "TextVQA",
    "category": "general-vqa", "task": "visual question answering", "context": "natural image",
    "grade": "not applicable", "skills": ["numeric commonsense", "arithmetic reasoning"],
}  # fmt: skip
MATHVISTA_PROBLEMS = {
    "1": {"question": "By what distance is the spring compressed?", "image": "images/1.jpg", "choices": None,
          "unit": None, "precision": 1, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
          "pid": "1", "metadata": MATHVISTA_METADATA},
    "2": {"question": "What is the volume?", "image": "images/2.jpg", "choices": None, "unit": "g",
          "precision": None, "answer": "1000", "question_type": "free_form", "answer_type": "integer", "pid": "2",
          "metadata": MATHVISTA_METADATA},
    "7": {"question": "What time is shown?", "image": "images/7.jpg", "choices": ["half", "quarter", "o'clock"],
          "unit": None, "precision": None, "answer": "quarter", "question_type": "multi_choice", "answer_type": "text",
          "pid": "7", "metadata": MATHVISTA_METADATA},
}  # fmt: skip
MATHVISTA_QUERIES = {
    "1": "Hint: Please answer …\nQuestion: By what distance is the spring compressed?",
    "2": "Hint: Please answer …\nQuestion: What is the volume? (Unit: g)",
    "7": "Hint: Please answer …\nQuestion: What time is shown?\nChoices:\n(A) half\n(B) quarter\n(C) o'clock",
}
VQAV2_QUESTIONS = {
    "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"}, "task_type": "Open-Ended",
    "data_type": "mscoco", "license": {"name": "CC BY 4.0"}, "data_subtype": "val2014",
    "questions": [{"image_id": 42, "question": "What is it?", "question_id": 42000}],
}  # fmt: skip
VQAV2_ANNOTATIONS = {
    "info": {"version": "2.0"}, "license": {"name": "CC BY 4.0"}, "data_subtype": "val2014", "data_type": "mscoco",
    "annotations": [{
        "question_type": "what is", "multiple_choice_answer": "net", "image_id": 42, "answer_type": "other",
        "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": n} for n in range(1, 11)],
        "question_id": 42000,
    }],
}  # fmt: skip
DOCVQA = {
    "dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val",
    "data": [{
        "questionId": 49153, "question": "What is it?", "question_types": ["figure/diagram"],
        "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81", "answers": ["net"], "data_split": "val",
    }],
}  # fmt: skip
HUMAN = [{"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"}]
AUGMENTED = [
    {"imgname": "two_col_1.png", "query": "How many stores?", "label": "[10, 20]"}
]  # brackets are the answer's


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=4).encode())
    return folder


def load(task: str, folder: Path, limit: int | None = None) -> tuple[list[Example], list[BrokenRow]]:
    return read_examples(TASKS[task], folder, ImageStore(folder / "unused", folder), limit)


def mathvista(below: str = "") -> dict[str, Any]:
    pictures = {f"{below}images/{pid}.jpg": b"jpg" for pid in MATHVISTA_PROBLEMS}
    return {f"{below}testmini.json": MATHVISTA_PROBLEMS, f"{below}query.json": MATHVISTA_QUERIES} | pictures


@pytest.mark.parametrize("below", ["", "data/"])  # as downloaded, and as in the authors' repository
def test_mathvista_is_its_problems_by_pid_and_what_is_asked_beside_them(tmp_path: Path, below: str) -> None:
    found, broken = load("mathvista", write(tmp_path, mathvista(below)))
    assert not broken and [example.id for example in found] == ["1", "2", "7"]
    assert [example.references for example in found] == [("1.2",), ("1000",), ("B",)]
    assert [example.images for example in found] == [(tmp_path / f"{below}images/{n}.jpg",) for n in (1, 2, 7)]
    assert found[1].question.startswith(MATHVISTA_QUERIES["2"] + "\n")
    assert found[0].details["precision"] == 1 and found[2].details["choices"] == ["half", "quarter", "o'clock"]


def test_results_beside_the_authors_files_do_not_hide_them(tmp_path: Path) -> None:
    record = {"id": "1", "question": "?", "asked": "0", "answer": "1.2", "settings": {}}
    found, broken = load(
        "mathvista", write(tmp_path, mathvista() | {"1.answers.jsonl": json.dumps(record).encode()}), limit=2
    )
    assert not broken and [example.id for example in found] == ["1", "2"]


def test_mathvista_without_its_queries_says_which_file_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {"testmini.json": MATHVISTA_PROBLEMS})
    with pytest.raises(InputError, match=r"query\.json cannot be read"):
        load("mathvista", tmp_path)


def test_a_problem_without_its_query_or_its_picture_is_listed_alone(tmp_path: Path) -> None:
    files = mathvista() | {"query.json": {pid: text for pid, text in MATHVISTA_QUERIES.items() if pid != "2"}}
    del files["images/7.jpg"]
    found, broken = load("mathvista", write(tmp_path, files))
    assert [example.id for example in found] == ["1"]
    assert [word in row.reason for row, word in zip(broken, ("query", "7.jpg"), strict=True)] == [True, True]


@pytest.mark.parametrize("below", ["test/", "", "ChartQA Dataset/test/"])  # unpacked, --data …/test, and as cloned
@pytest.mark.parametrize("parts", [("human",), ("augmented",), ("human", "augmented")])
def test_chartqa_is_read_from_one_of_its_parts_or_both(tmp_path: Path, below: str, parts: tuple[str, ...]) -> None:
    content = {"human": HUMAN, "augmented": AUGMENTED}
    files: dict[str, Any] = {f"{below}test_{part}.json": content[part] for part in parts}
    files |= {f"{below}png/{entry['imgname']}": b"png" for part in parts for entry in content[part]}
    found, broken = load("chartqa", write(tmp_path, files))
    assert not broken and [example.group for example in found] == [f"{part}_test" for part in parts]
    assert [example.references for example in found] == [(content[part][0]["label"],) for part in parts]
    assert all(example.images[0].is_file() for example in found)


def test_vqav2_joins_questions_and_answers(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "v2_OpenEnded_mscoco_val2014_questions.json": VQAV2_QUESTIONS,
        "v2_mscoco_val2014_annotations.json": VQAV2_ANNOTATIONS,
        "val2014/COCO_val2014_000000000042.jpg": b"jpg",
    }
    (example,), broken = load("vqav2", write(tmp_path, files))
    assert not broken and (example.id, example.group, example.references) == ("42000", "other", ("net",) * 10)
    assert example.images == (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg",)


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("val_v1.0_withQT.json", "documents/pybv0228_81.png"),
        ("val_v1.0.json", "documents/pybv0228_81.png"),  # the edition without question types
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images/pybv0228_81.png"),  # the archives, unpacked
    ],
)
def test_docvqa_is_the_competitions_file(tmp_path: Path, name: str, picture: str) -> None:
    (example,), broken = load("docvqa", write(tmp_path, {name: DOCVQA, picture: b"png"}))
    assert not broken and (example.id, example.references) == ("49153", ("net",))
    assert example.images == (tmp_path / picture,)


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("mathvista", "testmini.json", []),
        ("mathvista", "query.json", ["What?"]),
        ("mathvista", "query.json", b'{"1": "a", "1": "b"}'),
        ("chartqa", "test/test_human.json", {"imgname": "1.png"}),
        ("chartqa", "test/test_human.json", b""),
        ("vqav2", "v2_mscoco_val2014_annotations.json", {"annotation": []}),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", [1]),
        ("docvqa", "val_v1.0_withQT.json", []),
        ("docvqa", "val_v1.0_withQT.json", {"data": {"questionId": 1}}),
        ("easy_vqa", "questions.json", {"a": 1}),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, task: str, name: str, content: object) -> None:
    if task == "mathvista":
        write(tmp_path, mathvista())
    write(tmp_path, {"v2_OpenEnded_mscoco_val2014_questions.json": VQAV2_QUESTIONS,
                     "v2_mscoco_val2014_annotations.json": VQAV2_ANNOTATIONS})  # fmt: skip
    with pytest.raises(InputError, match=name.rpartition("/")[2]):
        load(task, write(tmp_path, {name: content}))


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("chartqa", "test/test_human.json", [7, {}, {"imgname": ["a"], "query": "?", "label": "x"}]),
        ("docvqa", "val_v1.0_withQT.json", {"data": [None, {"questionId": [1], "question": "?"}, {"answers": "x"}]}),
        ("easy_vqa", "questions.json", [["what?", "yes"], "what?", [1, 2, 3]]),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [{"image_id": [4]}, 3, {}]}),
    ],
)
def test_entries_of_another_form_are_broken_rows(tmp_path: Path, task: str, name: str, content: object) -> None:
    write(tmp_path, {"v2_mscoco_val2014_annotations.json": {"annotations": [3, {"question_id": [1]}, {}]}})
    with pytest.raises(InputError, match="none of 3 rows can be used, the first because"):
        load(task, write(tmp_path, {name: content}))
