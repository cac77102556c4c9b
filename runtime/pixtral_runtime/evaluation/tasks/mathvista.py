"""MathVista: mathematics in pictures, with choices or without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.fields import (
    asked,
    is_missing,
    items,
    label,
    number,
    place_of,
    read_dataset_json,
    text,
    texts,
)
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, SaveImage, Task

PROBLEMS_FILE, QUERIES_FILE = "testmini.json", "query.json"


def examples(row: Row, place: int, save: SaveImage) -> list[Example]:
    """`query` has the hint and the lettered choices; with choices the reference is the answer's letter."""
    references = (answer := label(row, "answer"),)
    if not answer.strip():
        raise RowError("there is no answer")
    listed, kind = items(row.get("choices"), "choices"), label(row, "question_type")
    choices = list(texts(listed, "choices")) if listed else []
    if choices and answer not in choices:
        raise RowError(f"the answer {answer!r:.80} is none of the choices {choices!r:.80}")
    if choices:
        references = (chr(ord("A") + choices.index(answer)),)
    elif kind == "multi_choice":
        raise RowError("there are no choices")
    image = row.get("image") if is_missing(row.get("decoded_image")) else row.get("decoded_image")
    messages = asked(text(row, "query"), [save(image)], PROMPTS["mathvista"])
    details = {
        "answer": answer,
        "choices": choices,
        "answer_type": label(row, "answer_type"),
        "precision": number(row, "precision"),
        "final_answer": True,
    }
    return [Example(label(row, "pid") or str(place), messages, references, kind, details=details)]


def read(folder: Path) -> Iterator[Row | BrokenRow]:
    """The authors' own files: problems by pid in `testmini.json`, what is asked in `query.json`, and `images`."""
    below = place_of(folder, (PROBLEMS_FILE,), ("", "data/"))
    problems, queries = (read_dataset_json(folder / below / name) for name in (PROBLEMS_FILE, QUERIES_FILE))
    for name, content in ((PROBLEMS_FILE, problems), (QUERIES_FILE, queries)):
        if not isinstance(content, dict):
            raise InputError(f"{folder / below / name} is not by pid, as it is published", "download it again")
    for pid, problem in problems.items():
        if isinstance(problem, dict):
            image = f"{below}{problem['image']}" if isinstance(problem.get("image"), str) else None
            yield problem | {"pid": pid, "query": queries.get(pid), "image": image}
        else:
            yield BrokenRow(pid, "not an object")


TASK = Task(
    name="mathvista",
    dataset="AI4Math/MathVista",
    config="",
    split="testmini",
    max_new_tokens=2048,
    metrics=("level_2", "level_3", "level_1", "baseline", "exact_choice", "mathvista"),
    columns=("decoded_image", "query", "choices", "answer"),
    examples=examples,
    read=read,
)
