"""A dataset's rows from a local folder or a file of JSON lines, and the examples that a task makes of them.

A folder holds the parquet files that the Hugging Face hub has, JSON lines with the same columns, or a dataset's own
files. What is wrong with one row concerns that row alone; what is wrong with a file is said before any work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, MachineError, Option, Remedy, SettingError, extra_missing
from pixtral_runtime.evaluation.curve import saved_budgets
from pixtral_runtime.evaluation.fields import is_own
from pixtral_runtime.evaluation.parquet_files import parquet_parts, parquet_rows, split_parts
from pixtral_runtime.evaluation.parts import with_gaps
from pixtral_runtime.evaluation.result import read_evaluation
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, Task
from pixtral_runtime.inputs.text_file import parsed_json, read_lines
from pixtral_runtime.inputs.text_windows import PLAIN

LINES = (".jsonl", ".ndjson")
TABLES, TEXTS = (".parquet", ".csv", *PLAIN), (".json", ".jsonl")  # where datasets have their rows


def read_examples(
    task: Task, folder: Path, images: ImageStore, limit: int | None
) -> tuple[list[Example], list[BrokenRow]]:
    """Examples of the first `limit` rows, and the rows that gave none.

    Raises InputError where the folder does not hold the dataset, MachineError where pyarrow is missing.
    """
    found: dict[str, Example] = {}
    broken: list[BrokenRow] = []
    wanted = None if limit is None else min(limit, sys.maxsize)
    for number, row in enumerate(islice(read_rows(folder, task), wanted)):
        if isinstance(row, BrokenRow):
            broken.append(row)
            continue
        try:
            made = task.examples(row, number, images)
            if known := [example.id for example in made if example.id in found]:
                raise RowError(f"the id {known[0]} was there before")
            found |= {example.id: example for example in made}
        except RowError as error:
            broken.append(BrokenRow(f"row {number}", str(error)))
    if not found:
        reason = f", the first because {broken[0].reason}" if broken else ""
        raise InputError(f"{folder}: none of {len(broken)} rows can be used{reason}", _other_data(task))
    return list(found.values()), broken


def read_rows(folder: Path, task: Task) -> Iterator[Row | BrokenRow]:
    """Rows in the dataset's order. Raises InputError and MachineError as `read_examples` does."""
    if task.asks == "tokens" and task.read is not None:  # one file will do
        return iter(task.read(folder))
    if folder.suffix in LINES and os.path.isfile(folder):
        return _json_lines([folder])
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is no folder, and no file of JSON lines", _other_data(task))
    if parts := parquet_parts(folder, task):
        return parquet_rows(parts, task, _other_data(task))
    if lines := _split_lines(folder, task.split):
        return _json_lines(with_gaps(lines))
    files = sorted(folder.glob("*.jsonl"))
    if lines := [path for path in files if not is_own_file(path)]:
        return _json_lines(with_gaps(lines))
    if task.read is not None:
        return iter(task.read(folder))
    others = ", only results that pixtral wrote" if files else ""
    raise InputError(f"{folder} has no {_wanted(task)}{others}", _other_data(task), *_by_hand(task))


def with_shots(task: Task, folder: Path, number: int | None = None) -> Task:
    """The task with solved questions before each of its own: so many, or the usual number.

    Raises SettingError where the task has none, InputError where the folder does not hold them.
    """
    if task.shots is None:
        if number is not None:
            raise SettingError(f"{task.name} has no solved questions to begin with", Option("shots", 0, "or leave it"))
        return task
    shots = replace(task.shots, number=task.shots.number if number is None else number)
    if not shots.number:
        return replace(task, shots=shots)
    rows = list(_solved_rows(replace(task, split=shots.split, read=shots.read), folder))
    if broken := [row for row in rows if isinstance(row, BrokenRow)]:
        raise InputError(f"{folder}: {broken[0].id} cannot be a solved question: {broken[0].reason}", *_no_shots(task))
    try:
        examples = shots.before([row for row in rows if not isinstance(row, BrokenRow)], shots.number)
    except RowError as error:
        raise InputError(f"{folder}: a solved question cannot be used: {error}", *_no_shots(task)) from error
    return replace(task, shots=shots, examples=examples)


def _solved_rows(source: Task, folder: Path) -> Iterator[Row | BrokenRow]:
    """Rows of one split and no other. Raises InputError."""
    if parts := split_parts(folder, source):
        return parquet_rows(parts, source, _other_data(source))
    if lines := _split_lines(folder, source.split):
        return _json_lines(with_gaps(lines))
    try:
        return iter([] if source.read is None else list(source.read(folder)))
    except InputError as error:
        raise InputError(f"there are no solved questions to begin with: {error}", *_no_shots(source)) from error


def _no_shots(task: Task) -> tuple[Remedy, ...]:
    return Option("shots", 0), *_by_hand(task)


def _split_lines(folder: Path, split: str) -> list[Path]:
    """The split's own JSON lines, where files are named so."""
    if not split:
        return []
    return sorted(path for name in (f"{split}.jsonl", f"{split}-*.jsonl") for path in folder.glob(name))


def image_folder(data: Path) -> Path:
    """Where the rows' names of images begin: the folder itself, or that of a file."""
    return data if os.path.isdir(data) else data.parent


def may_hold_rows(path: Path, folder: Path) -> bool:
    """Whether a file is part of a dataset in this folder, as far as its place, its name and its beginning tell."""
    is_inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    return is_inside and (path.suffix in TABLES or (path.suffix in TEXTS and not is_own_file(path)))


def download_dataset(task: Task) -> Path:
    """The dataset from the hub, in the hub library's own cache. Raises InputError, MachineError."""
    if not task.dataset:
        raise InputError(f"{task.name} is not on the hub", _other_data(task))
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise extra_missing("huggingface-hub", "eval", "Downloading a dataset") from error
    by_hand: list[Remedy] = [*_by_hand(task), Option("data", "FOLDER")]
    try:
        return Path(snapshot_download(task.dataset, repo_type="dataset", allow_patterns=hub_files(task)))
    except hub.HfHubHTTPError as error:
        raise InputError(f"the hub refuses {task.dataset}: {_first_line(error)}", "hf auth login", *by_hand) from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # the base class of its HTTP library
        raise MachineError(f"{task.dataset} cannot be downloaded: {_first_line(error)}", *by_hand) from error


def hub_files(task: Task) -> list[str]:
    """Patterns of what is downloaded of a dataset: its split, and that of the solved questions."""
    splits = [task.split] if task.shots is None else [task.split, task.shots.split]
    return list(task.files) or [f"{task.config or '**'}/{split}-*.parquet" for split in splits]


def _by_hand(task: Task) -> list[str]:
    return [f"hf download {task.dataset} --repo-type dataset --local-dir FOLDER"] if task.dataset else []


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _wanted(task: Task) -> str:
    """What a folder should hold, for people."""
    if task.asks == "tokens":
        return ".txt, .md or .jsonl files"
    if task.files:
        return f"{' or '.join(task.files)} of {task.dataset}"
    if task.dataset:
        return f"{task.split}-*.parquet of {task.dataset}"
    return "JSON lines such as rows.jsonl" if task.read is None else f"the files of {task.name}"


def _other_data(task: Task) -> Option:
    return Option("data", "FOLDER", f"with {_wanted(task)}")


def _json_lines(parts: Iterable[Path | BrokenRow]) -> Iterator[Row | BrokenRow]:
    for path in parts:
        if isinstance(path, BrokenRow):
            yield path
            continue
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield _json_row(line, f"{path.name}, line {number}")


def is_own_file(path: Path) -> bool:
    """Whether pixtral wrote the file: results and ratings, by the first line, or an evaluation's result or curve."""
    first = next((line for line in read_lines(path) if line.strip()), "")
    if first == "{":  # a document over many lines
        try:
            read_evaluation(path)
        except InputError:
            return saved_budgets(path) is not None
        return True
    row = _json_row(first, path.name)
    return isinstance(row, dict) and is_own(row.keys())


def _json_row(line: str, name: str) -> Row | BrokenRow:
    try:
        row: Any = parsed_json(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(name, f"not JSON: {error}")
    return row if isinstance(row, dict) else BrokenRow(name, "not an object")
