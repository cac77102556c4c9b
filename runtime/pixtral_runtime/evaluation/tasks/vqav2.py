"""VQAv2: short answers about photographs, ten people's each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, items_or_one, label, place_of, read_dataset_entries, text, texts
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, SaveImage, Task

QUESTIONS_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS_FILE = "v2_mscoco_val2014_annotations.json"


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """`answers` are dictionaries with what each person said, or the texts alone."""
    said = items_or_one(row.get("answers"), "answers")
    if isinstance(said, list):
        said = [one.get("answer") if isinstance(one, dict) else one for one in said]
    messages = asked(text(row, "question"), [save(row.get("image"))], PROMPTS["vqav2"])
    name = label(row, "question_id") or str(number)
    return [Example(name, messages, texts(said, "answers"), label(row, "answer_type"))]


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The authors' own files, with MS COCO's pictures beside them."""
    place_of(folder, (QUESTIONS_FILE,), ("",))
    listed = read_dataset_entries(folder / ANSWERS_FILE, "annotations")
    answers = {str(one.get("question_id")): one for one in listed if not isinstance(one, BrokenRow)}
    for one in read_dataset_entries(folder / QUESTIONS_FILE, "questions"):
        if isinstance(one, BrokenRow):
            yield one
        else:
            picture = f"val2014/COCO_val2014_{one.get('image_id')!s:0>12}.jpg"
            yield {**one, **answers.get(str(one.get("question_id")), {}), "image": picture}


TASK = Task(
    name="vqav2",
    dataset="lmms-lab-encoder/VQAv2",
    config="",
    split="validation",
    max_new_tokens=10,
    metrics=("vqa_accuracy", "mistral_vqa_match"),
    columns=("image", "question", "answers"),
    examples=examples,
    read=read,
)
