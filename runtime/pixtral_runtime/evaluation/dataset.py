"""A dataset's rows from a local folder, and the examples that a task makes of them.

A folder holds the parquet files that the Hugging Face hub has, JSON lines with the same columns, or a dataset's own
files. What is wrong with one row concerns that row alone; what is wrong with a file is said before any work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, MachineError, Option, extra_missing
from pixtral_runtime.evaluation.task import BrokenRow, Example, Row, RowError, Task
from pixtral_runtime.files import write_atomically
from pixtral_runtime.inputs.text_file import read_lines

BATCH_ROWS = 16  # read at a time: images are inside
IMAGE_SUFFIX_BY_START = {
    b"\xff\xd8": ".jpg",
    b"\x89P": ".png",
    b"GI": ".gif",
    b"RI": ".webp",
    b"BM": ".bmp",
    b"II": ".tif",
}


class ImageStore:
    """Images of rows as files. Bytes are written to `folder` once, as they are, under the hash of their content.

    Paths are relative to `data`. Mistral's code compresses JPEGs once more on their way to the server; this does not.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data

    def __call__(self, image: object) -> Path:
        """The file of an image as a row has it. Raises RowError where there is none."""
        content = image.get("bytes") if isinstance(image, dict) else image
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(content, bytes) and content:
            return self._written(content)
        if not isinstance(path, str) or not path:
            raise RowError("there is no image")
        if not (found := self._data / path).is_file():
            raise RowError(f"there is no file {found}")
        return found

    def _written(self, content: bytes) -> Path:
        path = self._folder / (hashlib.sha256(content).hexdigest() + IMAGE_SUFFIX_BY_START.get(content[:2], ".image"))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        return path


def read_examples(
    task: Task, folder: Path, images: ImageStore, limit: int | None
) -> tuple[list[Example], list[BrokenRow]]:
    """Examples of the first `limit` rows, and the rows that gave none.

    Raises InputError where the folder does not hold the dataset, MachineError where pyarrow is missing.
    """
    found: dict[str, Example] = {}
    broken: list[BrokenRow] = []
    for number, row in enumerate(islice(read_rows(folder, task), limit)):
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
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", _other_data(task))
    if tables := _tables(folder, task):
        return _parquet_rows(tables, task)
    if lines := sorted(folder.glob("*.jsonl")):
        return _json_lines(lines)
    if task.read is not None:
        return iter(task.read(folder))
    raise InputError(f"{folder} has no {_wanted(task)}", _other_data(task), f"hf download {task.dataset}")


def download_dataset(task: Task) -> Path:
    """The dataset from the hub, in the hub library's own cache. Raises InputError, MachineError."""
    if not task.dataset:
        raise InputError(f"{task.name} is not on the hub", _other_data(task))
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise extra_missing("huggingface-hub", "eval", "Downloading a dataset") from error
    patterns = [f"{task.config}/{task.split}-*.parquet"] if task.config else [f"**/{task.split}-*.parquet"]
    by_hand = f"hf download {task.dataset} --repo-type dataset --local-dir FOLDER", Option("data", "FOLDER")
    try:
        return Path(snapshot_download(task.dataset, repo_type="dataset", allow_patterns=patterns))
    except hub.HfHubHTTPError as error:
        raise InputError(f"the hub refuses {task.dataset}: {_first_line(error)}", "hf auth login", *by_hand) from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # the base class of its HTTP library
        raise MachineError(f"{task.dataset} cannot be downloaded: {_first_line(error)}", *by_hand) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _wanted(task: Task) -> str:
    """What a folder should hold, for people."""
    if task.dataset:
        return f"{task.split}-*.parquet of {task.dataset}"
    return "a file of JSON lines, rows.jsonl" if task.read is None else f"the files of {task.name}"


def _other_data(task: Task) -> Option:
    return Option("data", "FOLDER", f"with {_wanted(task)}")


def _tables(folder: Path, task: Task) -> list[Path]:
    """The split's files; all of them where none is named so."""
    if task.split:
        for below in (f"{task.config}/", "") if task.config else ("",):
            if found := sorted(folder.rglob(f"{below}{task.split}-*.parquet")):
                return found
    return sorted(folder.rglob("*.parquet"))


def _parquet_rows(paths: Iterable[Path], task: Task) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise extra_missing("pyarrow", "eval", "Reading parquet files") from error
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            names = set(file.schema_arrow.names)
            if missing := [name for name in task.columns if name not in names]:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}, it has {', '.join(sorted(names))}",
                    _other_data(task),
                )
            for batch in file.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read: {_first_line(error)}", "download it again") from error


def _json_lines(paths: Iterable[Path]) -> Iterator[Row | BrokenRow]:
    for path in paths:
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield _json_row(line, f"{path.name}, line {number}")


def _json_row(line: str, name: str) -> Row | BrokenRow:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(name, f"not JSON: {error}")
    return row if isinstance(row, dict) else BrokenRow(name, "not an object")
