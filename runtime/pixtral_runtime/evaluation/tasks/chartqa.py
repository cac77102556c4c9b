"""ChartQA: questions about charts, half of them written by people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, label, read_dataset_json, text, texts
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, SaveImage, Task

OWN_FILES = {"human_test": "test_human.json", "augmented_test": "test_augmented.json"}


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    messages = asked(text(row, "question"), [save(row.get("image"))], PROMPTS["chartqa"])
    return [Example(str(number), messages, texts(row.get("answer"), "answer"), label(row, "type"))]


def read(folder: Path) -> Iterator[Row]:
    """The authors' own files: `test/test_human.json`, `test/test_augmented.json`, `test/png`."""
    for kind, name in OWN_FILES.items():
        for one in read_dataset_json(folder / "test" / name):
            image = f"test/png/{one['imgname']}"
            yield {"type": kind, "question": one.get("query"), "answer": one.get("label"), "image": image}


TASK = Task(
    name="chartqa",
    dataset="lmms-lab/ChartQA",
    config="",
    split="test",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline"),
    columns=("image", "question", "answer"),
    examples=examples,
    read=read,
)
