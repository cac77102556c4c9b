"""MathVista: mathematics in pictures, with choices or without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.evaluation.fields import asked, label, read_dataset_json, text
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example, Row, RowError, SaveImage, Task


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """`query` has the hint and the lettered choices; with choices the reference is the answer's letter."""
    answer, choices, precision = text(row, "answer"), row.get("choices"), row.get("precision")
    if choices:
        if answer not in choices:
            raise RowError(f"the answer {answer!r:.80} is none of the choices {choices!r:.80}")
        answer = chr(ord("A") + choices.index(answer))
    messages = asked(text(row, "query"), [save(row.get("decoded_image"))], PROMPTS["mathvista"])
    details = {"precision": precision if isinstance(precision, int | float) else None}
    name = label(row, "pid") or str(number)
    return [Example(name, messages, (answer,), label(row, "question_type"), details=details)]


def read(folder: Path) -> Iterator[Row]:
    """The authors' own `testmini.json`; pictures are where its `image` says."""
    for pid, one in read_dataset_json(folder / "testmini.json").items():
        yield {"pid": pid} | one | {"decoded_image": one.get("image")}


TASK = Task(
    name="mathvista",
    dataset="AI4Math/MathVista",
    config="",
    split="testmini",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline", "exact_choice"),
    columns=("decoded_image", "query", "choices", "answer"),
    examples=examples,
    read=read,
)
