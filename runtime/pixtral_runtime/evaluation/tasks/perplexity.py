"""Perplexity: how well a bundle predicts the user's own texts, files of `.txt`, `.md` and `.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.errors import Option
from pixtral_runtime.evaluation.dataset import is_own_file
from pixtral_runtime.evaluation.fields import text
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, SaveImage, Task
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.text_windows import LINES, BadText, read_texts, text_files


def examples(row: Row, number: int, save: SaveImage) -> list[Example]:
    """A whole text; `reading.windows_of` makes windows of it."""
    return [Example(text(row, "name"), (Message("user", (str(row["text"]),)),), (), text(row, "file"))]


def read(place: Path) -> Iterator[Row | BrokenRow]:
    """One file, or those of a folder but for results that were written there."""
    files = text_files(place, Option("data", "FOLDER", "with .txt, .md or .jsonl files, or one of them"))
    texts = [path for path in files if path.suffix != LINES or not is_own_file(path)]
    for one in read_texts(texts, place if place.is_dir() else None):
        yield BrokenRow(one.name, one.reason) if isinstance(one, BadText) else vars(one)


TASK = Task(
    name="perplexity",
    dataset="",
    config="",
    split="",
    max_new_tokens=1,
    metrics=("nats_per_token", "bits_per_byte"),
    columns=(),
    examples=examples,
    read=read,
    asks="tokens",
    has_pictures=False,
)
