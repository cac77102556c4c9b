"""Rows of the parquet files that the Hugging Face hub has of a dataset, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, Option, extra_missing
from pixtral_runtime.evaluation.fields import is_own
from pixtral_runtime.evaluation.parts import with_gaps
from pixtral_runtime.evaluation.task import BrokenRow, Row, Task

BATCH_ROWS = 16  # read at a time: images are inside


def parquet_parts(folder: Path, task: Task) -> list[Path | BrokenRow]:
    """The split's files, with what is missing between them; all files where none is named so, but for tables of
    results. Raises InputError, MachineError."""
    if found := split_parts(folder, task):
        return found
    return [path for path in sorted(folder.rglob("*.parquet")) if not is_own(_columns(path))]


def split_parts(folder: Path, task: Task) -> list[Path | BrokenRow]:
    """The split's files alone, in order and with what is missing between them. Raises InputError."""
    if task.split:
        for below in (f"{task.config}/", "") if task.config else ("",):
            if found := sorted(folder.rglob(f"{below}{task.split}-*.parquet")):
                return with_gaps(found)
    return []


def parquet_rows(parts: Iterable[Path | BrokenRow], task: Task, other_data: Option) -> Iterator[Row | BrokenRow]:
    """Rows of the parts in their order. Raises InputError, MachineError."""
    wanted = [(names,) if isinstance(names, str) else names for names in task.columns]
    for part in parts:
        if isinstance(part, BrokenRow):
            yield part
            continue
        columns = _columns(part)
        if missing := [" or ".join(names) for names in wanted if columns.isdisjoint(names)]:
            raise InputError(
                f"{part} has no column {', '.join(missing)}, it has {', '.join(sorted(columns))}", other_data
            )
        with _reading(part) as pq:
            for batch in pq.ParquetFile(part).iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()


def _columns(path: Path) -> set[str]:
    with _reading(path) as pq:
        return set(pq.ParquetFile(path).schema_arrow.names)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """pyarrow.parquet, for a file that may be damaged. Raises InputError, MissingPackageError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise extra_missing("pyarrow", "eval", "Reading parquet files") from error
    try:
        yield pq
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}", "download it again") from error
