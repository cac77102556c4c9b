"""Every benchmark's parquet files, written in the schema that the hub publishes, through loader, task and metric."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.metrics import METRICS
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tasks.registry import TASKS

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SAID = pa.list_(pa.struct([("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())]))
TEXT = pa.string()
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A plot."},
]


def picture(color: str) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def ten(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, start=1)]


PUBLISHED: dict[str, tuple[str, dict[str, pa.DataType], list[dict[str, Any]]]] = {
    "vqav2": (
        "data/validation-00000-of-00068.parquet",
        {"question_type": TEXT, "multiple_choice_answer": TEXT, "answers": SAID, "image_id": pa.int64(),
         "answer_type": TEXT, "question_id": pa.int64(), "question": TEXT, "image": IMAGE},
        [{"question_type": "is", "multiple_choice_answer": "net", "answers": ten(*["net"] * 9, "a net"), "image_id": 1,
          "answer_type": "other", "question_id": 7, "question": "What?", "image": picture("red")}],
    ),
    "docvqa": (
        "DocVQA/validation-00000-of-00006.parquet",
        {"questionId": TEXT, "question": TEXT, "question_types": pa.list_(TEXT), "image": IMAGE, "docId": pa.int64(),
         "ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": pa.list_(TEXT), "data_split": TEXT},
        [{"questionId": "9", "question": "What?", "question_types": ["form"], "image": picture("blue"), "docId": 1,
          "ucsf_document_id": "x", "ucsf_document_page_no": "2", "answers": ["net", "a net"], "data_split": "val"}],
    ),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
        [{"type": "human_test", "question": "What?", "answer": "net", "image": picture("green")}],
    ),
    "mathvista": (
        "data/testmini-00000-of-00001-725687bf7a18d64b.parquet",
        {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": IMAGE, "choices": pa.list_(TEXT), "unit": TEXT,
         "precision": pa.float64(), "answer": TEXT, "question_type": TEXT, "answer_type": TEXT,
         "metadata": pa.struct([("category", TEXT), ("skills", pa.list_(TEXT))]), "query": TEXT},
        [{"pid": "3", "question": "What?", "image": "images/3.jpg", "decoded_image": picture("red"), "choices": None,
          "unit": None, "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
          "metadata": {"category": "math", "skills": ["algebra"]}, "query": "What?"},
         {"pid": "4", "question": "Which?", "image": "images/4.jpg", "decoded_image": picture("red"),
          "choices": ["rope", "net"], "unit": None, "precision": None, "answer": "net", "question_type": "multi_choice",
          "answer_type": "text", "metadata": {"category": "vqa", "skills": []}, "query": "Which?\n(A) rope\n(B) net"}],
    ),
    "mmmu": (
        "data/validation-00000-of-00001.parquet",
        {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT,
         **{f"image_{n}": IMAGE for n in range(1, 8)}, "img_type": TEXT, "answer": TEXT,
         "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT},
        [{"id": "validation_Art_1", "question": "<image 1> or <image 2>?", "options": "['one', 'two']",
          "explanation": "", "image_1": picture("red"), "image_2": picture("blue"),
          "img_type": "['Painting']", "answer": "B", "topic_difficulty": "Easy",
          "question_type": "multiple-choice", "subfield": "Drawing"}],
    ),
    "mm_mt_bench": (
        "data/eval-00000-of-00001.parquet",
        {"image": IMAGE, "conversation": TEXT, "category": TEXT},
        [{"image": picture("red"), "conversation": json.dumps(TALK), "category": "charts"}],
    ),
}  # fmt: skip
RIGHT = {"vqav2": ["Net."], "docvqa": ["net"], "chartqa": ["Final Answer: net"], "mmmu": ["Final Answer: B"],
         "mathvista": ["Final Answer: 1.23", "**Final Answer:** (B)"]}  # fmt: skip


OTHER_EDITIONS: dict[str, tuple[str, tuple[str, dict[str, pa.DataType], list[dict[str, Any]]]]] = {
    "HuggingFaceM4/ChartQA": (
        "chartqa",
        (
            "data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet",
            {"image": IMAGE, "query": TEXT, "label": pa.list_(TEXT), "human_or_machine": pa.int64()},
            [{"image": picture("green"), "query": "What?", "label": ["net"], "human_or_machine": 0},
             {"image": picture("blue"), "query": "How many?", "label": ["14"], "human_or_machine": 1}],
        ),
    ),
    "MMMU/MMMU": (
        "mmmu",
        ("Accounting/validation-00000-of-00001.parquet", *PUBLISHED["mmmu"][1:]),
    ),
}  # fmt: skip


def load(task: str, folder: Path, published: tuple[str, dict[str, pa.DataType], list[dict[str, Any]]]) -> list[Example]:
    """The examples of one file; all of a dataset's other files are missed, as one line."""
    name, schema, rows = published
    (folder / name).parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(schema.items()))), folder / name)
    found, broken = read_examples(TASKS[task], folder, ImageStore(folder / "cache", folder), None)
    assert len(broken) == ("-of-00001" not in name)
    return found


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_files_become_examples_with_their_images(task: str, tmp_path: Path) -> None:
    found = load(task, tmp_path, PUBLISHED[task])
    images = [
        value for row in PUBLISHED[task][2] for value in row.values() if isinstance(value, dict) and "bytes" in value
    ]
    stored = [path.read_bytes() for example in found for path in example.images]
    assert stored == [image["bytes"] for image in images]
    assert all(example.references and example.question for example in found)


@pytest.mark.parametrize("task", RIGHT)
def test_a_right_answer_to_a_published_row_scores_one_and_a_wrong_one_zero(task: str, tmp_path: Path) -> None:
    headline = METRICS[TASKS[task].metrics[0]]
    found = load(task, tmp_path, PUBLISHED[task])
    assert [headline(answer, example) for answer, example in zip(RIGHT[task], found, strict=True)] == [1.0] * len(found)
    assert all(headline("Final Answer: 1000 of something else entirely", example) < 0.5 for example in found)


def test_precision_reaches_the_official_metric(tmp_path: Path) -> None:
    number, choice = load("mathvista", tmp_path, PUBLISHED["mathvista"])
    exact = METRICS["exact_choice"]
    assert exact("Final Answer: 1.23", number) == 1 and exact("Final Answer: 1.3", number) == 0
    assert exact("Final Answer: B", choice) == 1 and exact("Final Answer: A", choice) == 0


@pytest.mark.parametrize("edition", OTHER_EDITIONS)
def test_other_editions_of_a_dataset_are_read(edition: str, tmp_path: Path) -> None:
    task, published = OTHER_EDITIONS[edition]
    found = load(task, tmp_path, published)
    assert [example.references for example in found] == ([("net",), ("14",)] if task == "chartqa" else [("B",)])
    groups = [example.group for example in found]
    assert groups == (["human_test", "augmented_test"] if task == "chartqa" else ["Art"])


@pytest.mark.parametrize(("task", "metric"), [("mmmu",) * 2, ("mathvista",) * 2, ("chartqa", "chartqa_relaxed")])
def test_the_authors_metrics_know_what_they_need_of_a_published_row(task: str, metric: str, tmp_path: Path) -> None:
    assert metric in TASKS[task].metrics
    for answer, example in zip(RIGHT[task], load(task, tmp_path, PUBLISHED[task]), strict=True):
        assert METRICS[metric](f"First, the picture.\n{answer}", example) == 1
        assert METRICS[metric]("Final Answer: A" if "choices" in example.details else "5 rope", example) == 0
        assert json.loads(json.dumps(example.details)) == example.details


def test_a_cached_image_that_was_changed_is_written_again(tmp_path: Path) -> None:
    store, content = ImageStore(tmp_path / "cache", tmp_path), b"\x89PNG\r\n and so on"
    path = store({"bytes": content})
    path.write_bytes(content[:-1] + b"N")
    assert store({"bytes": content}) == path
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
