"""DocVQA: what scanned documents say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, label, read_dataset_json, text, texts
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, SaveImage, Task

OWN_FILE = "val_v1.0_withQT.json"


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    messages = asked(text(row, "question"), [save(row.get("image"))], PROMPTS["docvqa"])
    return [Example(label(row, "questionId") or str(number), messages, texts(row.get("answers"), "answers"))]


def read(folder: Path) -> Iterator[Row]:
    """The Robust Reading Competition's own file; its pictures are in `documents`."""
    yield from read_dataset_json(folder / OWN_FILE)["data"]


TASK = Task(
    name="docvqa",
    dataset="lmms-lab/DocVQA",
    config="DocVQA",
    split="validation",
    max_new_tokens=10,
    metrics=("mistral_anls", "anls"),
    columns=("image", "question", "answers"),
    examples=examples,
    read=read,
)
