"""VQAv2: short answers about photographs, ten people's each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, label, read_dataset_json, text, texts
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, SaveImage, Task

QUESTIONS_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS_FILE = "v2_mscoco_val2014_annotations.json"


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """`answers` are dictionaries with what each person said, or the texts alone."""
    listed = row.get("answers")
    said = (
        [one.get("answer") if isinstance(one, dict) else one for one in listed] if isinstance(listed, list) else listed
    )
    messages = asked(text(row, "question"), [save(row.get("image"))], PROMPTS["vqav2"])
    name = label(row, "question_id") or str(number)
    return [Example(name, messages, texts(said, "answers"), label(row, "answer_type"))]


def read(folder: Path) -> Iterator[Row]:
    """The authors' own files, with MS COCO's pictures beside them."""
    answers = {one["question_id"]: one for one in read_dataset_json(folder / ANSWERS_FILE)["annotations"]}
    for one in read_dataset_json(folder / QUESTIONS_FILE)["questions"]:
        image = f"val2014/COCO_val2014_{one['image_id']:012}.jpg"
        yield one | answers.get(one["question_id"], {}) | {"image": image}


TASK = Task(
    name="vqav2",
    dataset="HuggingFaceM4/VQAv2",
    config="",
    split="validation",
    max_new_tokens=10,
    metrics=("vqa_accuracy", "mistral_vqa_match"),
    columns=("image", "question", "answers"),
    examples=examples,
    read=read,
)
