"""MATH: problems of competitions, whose answers are formulas in a box. MATH-500 is a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.fields import label, read_dataset_json, text
from pixtral_runtime.evaluation.math_answers import boxed
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message

PROMPT = "Solve the problem step by step, and put the final answer into \\boxed{}."
PLACES = ("test/", "MATH/test/", "")


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """The reference is what the solution has in its last box; without one it is the column `answer`."""
    reference = boxed(label(row, "solution"))
    reference = label(row, "answer") if reference is None else reference
    if not reference.strip():
        raise RowError("there is neither a box in the solution nor an answer")
    asked = (Message("user", (f"{text(row, 'problem')}\n{PROMPT}",)),)
    subject = label(row, "type") or label(row, "subject")
    return [Example(label(row, "unique_id") or str(number), asked, (reference,), subject)]


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The authors' own files, a folder for each subject and a file for each problem: `test/algebra/1.json`."""
    found = next((files for place in PLACES if (files := sorted((folder / place).glob("*/*.json"), key=_order))), [])
    if not found:
        published = Option("data", "DATASET_FOLDER", "as the hub or its authors publish it")
        raise InputError(f"{folder} has no folders of problems such as test/algebra/1.json", published)
    for path in found:
        name = f"{path.parent.name}/{path.stem}"
        try:
            row = read_dataset_json(path)
        except InputError as error:
            yield BrokenRow(name, str(error))
            continue
        yield {"unique_id": name, **row} if isinstance(row, dict) else BrokenRow(name, "not an object")


def _order(path: Path) -> tuple[str, int, str]:
    return path.parent.name, len(path.stem), path.stem


TASK = Task(
    name="math",
    dataset="HuggingFaceH4/MATH-500",
    config="",
    split="test",
    max_new_tokens=2048,
    metrics=("math_equivalent",),
    columns=("problem", "solution"),
    examples=examples,
    read=read,
    has_pictures=False,
    files=("test.jsonl",),
)
