"""easy-VQA: synthetic pictures of one shape, the demo checkpoint's benchmark. The package easy-vqa brings the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, label, read_dataset_json, text, texts
from pixtral_runtime.evaluation.task import Example, Row, SaveImage, Task

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    answer = text(row, "answer")
    kind = "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
    name = label(row, "id") or str(number)
    return [Example(name, asked(text(row, "question"), [save(row.get("image"))]), texts(answer, "answer"), kind)]


def read(folder: Path) -> Iterator[Row]:
    """The package's files: `questions.json` as [question, answer, picture], and pictures by number."""
    below = "test/" if (folder / "test").is_dir() else ""
    for question, answer, picture in read_dataset_json(folder / f"{below}questions.json"):
        yield {"question": question, "answer": answer, "image": f"{below}images/{picture}.png"}


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
