"""easy-VQA: synthetic pictures of one shape, the demo checkpoint's benchmark. The package easy-vqa brings the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.fields import asked, label, place_of, read_dataset_json, text, texts
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, SaveImage, Task

QUESTIONS_FILE = "questions.json"

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    answer = text(row, "answer")
    kind = "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
    name = label(row, "id") or str(number)
    return [Example(name, asked(text(row, "question"), [save(row.get("image"))]), texts(answer, "answer"), kind)]


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The package's files: `questions.json` as [question, answer, picture], and pictures by number."""
    below = place_of(folder, (QUESTIONS_FILE,), ("test/", ""))
    listed = read_dataset_json(path := folder / below / QUESTIONS_FILE)
    if not isinstance(listed, list):
        raise InputError(f"{path} is no list, as it is published", "download it again")
    for place, entry in enumerate(listed, start=1):
        if isinstance(entry, list) and len(entry) == 3:
            question, answer, picture = entry
            yield {"question": question, "answer": answer, "image": f"{below}images/{picture}.png"}
        else:
            yield BrokenRow(f"{path.name}, entry {place}", "not a question, its answer and its picture")


TASK = Task(
    name="easy_vqa",
    dataset="",
    config="",
    split="test",
    max_new_tokens=8,
    metrics=("exact",),
    columns=("image", "question", "answer"),
    examples=examples,
    read=read,
)
