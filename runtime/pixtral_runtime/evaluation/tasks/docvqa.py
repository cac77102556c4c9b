"""DocVQA: what scanned documents say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import (
    asked,
    items_or_one,
    label,
    place_of,
    read_dataset_entries,
    text,
    texts,
)
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, SaveImage, Task

OWN_FILES = ("val_v1.0_withQT.json", "val_v1.0.json")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    messages = asked(text(row, "question"), [save(row.get("image"))], PROMPTS["docvqa"])
    answers = texts(items_or_one(row.get("answers"), "answers"), "answers")
    return [Example(label(row, "questionId") or str(number), messages, answers)]


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The Robust Reading Competition's own file, of two editions the later, its pictures in `documents`; or its
    archives beside each other, whose pictures lie in `spdocvqa_images` while the file says `documents` still."""
    below = place_of(folder, OWN_FILES, ("", "spdocvqa_qas/"))
    path = next(path for name in OWN_FILES if (path := folder / below / name).is_file())
    for one in read_dataset_entries(path, "data"):
        if below and not isinstance(one, BrokenRow):
            image = str(one.get("image")).replace("documents/", "spdocvqa_images/", 1)
            yield {**one, "image": image}
        else:
            yield one


TASK = Task(
    name="docvqa",
    dataset="lmms-lab-encoder/DocVQA",
    config="DocVQA",
    split="validation",
    max_new_tokens=10,
    metrics=("mistral_anls", "anls"),
    columns=("image", "question", "answers"),
    examples=examples,
    read=read,
)
