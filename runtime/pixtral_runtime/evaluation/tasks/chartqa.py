"""ChartQA: questions about charts, half of them written by people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixtral_runtime.evaluation.fields import asked, label, place_of, read_dataset_entries, text, texts, written_list
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, SaveImage, Task

OWN_FILES = {"human_test": "test_human.json", "augmented_test": "test_augmented.json"}
PLACES = ("test/", "", "ChartQA Dataset/test/")
KINDS = {"0": "human_test", "human": "human_test", "1": "augmented_test", "machine": "augmented_test"}


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """Columns of lmms-lab-encoder/ChartQA, or those of HuggingFaceM4/ChartQA: `query`, `label`, `human_or_machine`."""
    if "query" in row and "question" not in row:
        question, answer = text(row, "query"), _labels(row.get("label"))
        kind = label(row, "human_or_machine")
        kind = KINDS.get(kind, kind)
    else:
        question, answer, kind = text(row, "question"), row.get("answer"), label(row, "type")
    messages = asked(question, [save(row.get("image"))], PROMPTS["chartqa"])
    return [Example(str(number), messages, texts(answer, "answer"), kind, details={"final_answer": True})]


def _labels(value: object) -> object:
    """A list of texts, or the text of one; another text, such as [2013, 2015], is an answer as it stands."""
    if not isinstance(value, str):
        return value
    try:
        listed: list[Any] = written_list(value, "label")
    except RowError:
        return value
    return listed if listed and all(isinstance(one, str) for one in listed) else value


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The authors' own files, one of them or both: `test/test_human.json`, `test/test_augmented.json`, `test/png`."""
    below = place_of(folder, tuple(OWN_FILES.values()), PLACES)
    for kind, name in OWN_FILES.items():
        path = folder / below / name
        for one in read_dataset_entries(path) if path.exists() else ():
            if isinstance(one, BrokenRow):
                yield one
            else:
                image = f"{below}png/{one.get('imgname')}"
                yield {"type": kind, "question": one.get("query"), "answer": one.get("label"), "image": image}


TASK = Task(
    name="chartqa",
    dataset="lmms-lab-encoder/ChartQA",
    config="",
    split="test",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline", "chartqa_relaxed"),
    columns=("image", ("question", "query"), ("answer", "label")),
    examples=examples,
    read=read,
)
