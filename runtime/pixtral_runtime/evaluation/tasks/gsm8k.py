"""GSM8K: grade-school word problems, whose last number counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pixtral_runtime.evaluation.fields import check_enough, place_of, text
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, SaveImage, Shots, Task
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.text_file import parsed_json, read_lines

MARK = "#### "
PROMPT = "Reason step by step, and end with a line that is #### and the number alone."  # where nothing shows it
PLACE = "grade_school_math/data/"


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    question = f"Question: {text(row, 'question')}\n{PROMPT}\nAnswer:"
    return [Example(str(number), (Message("user", (question,)),), (_number(row),))]


def before(rows: Sequence[Row], count: int) -> Callable[[Row, int, SaveImage], list[Example]]:
    """The solved questions are earlier turns of the conversation."""
    check_enough(rows, count)
    turns: list[Message] = []
    for row in rows[:count]:
        turns += [_asked(row), Message("assistant", (text(row, "answer"),))]
    return lambda row, number, save: [Example(str(number), (*turns, _asked(row)), (_number(row),))]


def read(folder: Path, split: str = "test") -> Iterator[Row | BrokenRow]:
    """The authors' repository, or its folder of files."""
    name = f"{split}.jsonl"
    path = folder / place_of(folder, (name,), (PLACE, "")) / name
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = parsed_json(line)
        except (ValueError, RecursionError) as error:
            yield BrokenRow(f"{path.name}, line {number}", f"not JSON: {error}")
            continue
        yield row if isinstance(row, dict) else BrokenRow(f"{path.name}, line {number}", "not an object")


def _asked(row: Row) -> Message:
    return Message("user", (f"Question: {text(row, 'question')}\nAnswer:",))


def _number(row: Row) -> str:
    """What follows the mark in the solution."""
    _, mark, number = text(row, "answer").rpartition(MARK)
    if not mark or not number.strip():
        raise RowError(f"answer has no number after {MARK.strip()!r}")
    return number.strip()


TASK = Task(
    name="gsm8k",
    dataset="openai/gsm8k",
    config="main",
    split="test",
    max_new_tokens=1024,
    metrics=("gsm8k_strict", "gsm8k_flexible"),
    columns=("question", "answer"),
    examples=examples,
    read=read,
    has_pictures=False,
    shots=Shots(5, "train", before, partial(read, split="train")),
)
