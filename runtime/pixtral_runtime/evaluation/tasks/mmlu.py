"""MMLU: questions of 57 subjects with four choices, asked as its authors ask them: the likeliest of four letters."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.fields import check_enough, items, label, text, texts
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, SaveImage, Shots, Task
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.text_file import read_text

LETTERS = "ABCD"
PLACES = ("data/", "", "../")  # of a folder for each split, as the authors' archive has them


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    return _example(row, number, {})


def before(rows: Sequence[Row], count: int) -> Callable[[Row, int, SaveImage], list[Example]]:
    """Each subject's own first questions stand before its others."""
    solved: dict[str, list[str]] = {}
    for row in rows:
        solved.setdefault(text(row, "subject"), []).append(f"{_question(row)} {_answer(row)}\n\n")
    for subject, those in solved.items():
        check_enough(those, count, f" of {subject}")
    shown = {subject: "".join(those[:count]) for subject, those in solved.items()}
    return lambda row, number, save: _example(row, number, shown)


def read(folder: Path, split: str = "test") -> Iterator[Row | BrokenRow]:
    """The authors' own files: `test/astronomy_test.csv` and such, without a line of names."""
    found = next((files for place in PLACES if (files := sorted((folder / place / split).glob(f"*_{split}.csv")))), [])
    if not found:
        published = Option("data", "DATASET_FOLDER", "as the hub or its authors publish it")
        raise InputError(f"{folder} has no {split}/*_{split}.csv", published)
    for path in found:
        subject = path.name.removesuffix(f"_{split}.csv")
        for number, cells in enumerate(_cells(path), start=1):
            if len(cells) != 6:
                yield BrokenRow(f"{path.name}, row {number}", f"it has {len(cells)} cells, expected 6")
            else:
                yield {"subject": subject, "question": cells[0], "choices": cells[1:5], "answer": cells[5]}


def _cells(path: Path) -> Iterator[list[str]]:
    """The rows of a table. Raises InputError where it is none."""
    try:
        yield from csv.reader(io.StringIO(read_text(path)))
    except csv.Error as error:
        raise InputError(f"{path} is damaged: {error}", "download it again") from error


def _example(row: Row, number: int, solved: dict[str, str] | None) -> list[Example]:
    subject = text(row, "subject")
    if solved and subject not in solved:
        raise RowError(f"there is no solved question of {subject}")
    start = "The following are multiple choice questions (with answers) about "
    start += "".join(f" {word}" for word in subject.split("_")) + ".\n\n"  # two spaces, as the authors have them
    prompt = start + (solved or {}).get(subject, "") + _question(row)
    return [Example(f"{subject}/{number}", (Message("user", (prompt,)),), (_answer(row),), subject)]


def _question(row: Row) -> str:
    choices = texts(items(row.get("choices"), "choices"), "choices")
    if len(choices) != len(LETTERS):
        raise RowError(f"choices are {len(choices)}, expected {len(LETTERS)}")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{text(row, 'question')}{listed}\nAnswer:"


def _answer(row: Row) -> str:
    """A letter, or its place from 0."""
    answer = label(row, "answer").strip()
    answer = LETTERS[int(answer)] if answer in ("0", "1", "2", "3") else answer
    if answer not in tuple(LETTERS):
        raise RowError(f"answer is {answer!r:.80}, expected a letter or its place")
    return answer


TASK = Task(
    name="mmlu",
    dataset="cais/mmlu",
    config="all",
    split="test",
    max_new_tokens=1,
    metrics=("mmlu",),
    columns=("question", "subject", "choices", "answer"),
    examples=examples,
    read=read,
    asks="choice",
    has_pictures=False,
    shots=Shots(5, "dev", before, partial(read, split="dev")),
)
