"""Rows of the parquet files that the Hugging Face hub has of a dataset, part by part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, Option, extra_missing
from pixtral_runtime.evaluation.fields import is_own
from pixtral_runtime.evaluation.task import BrokenRow, Row, Task

BATCH_ROWS = 16  # read at a time: images are inside
SHOWN_PARTS = 3
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")


def parquet_parts(folder: Path, task: Task) -> list[Path | BrokenRow]:
    """The split's files, with what is missing between them; all files where none is named so, but for tables of
    results. Raises InputError, MachineError."""
    if task.split:
        for below in (f"{task.config}/", "") if task.config else ("",):
            if found := sorted(folder.rglob(f"{below}{task.split}-*.parquet")):
                return _with_gaps(found)
    return [path for path in sorted(folder.rglob("*.parquet")) if not is_own(_columns(path))]


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


def _with_gaps(paths: Iterable[Path]) -> list[Path | BrokenRow]:
    """Files in order, and what is missing in the place of its first part. Raises InputError for parts of two editions:
    their rows would count twice."""
    series: dict[tuple[Path, str], dict[int, Path]] = {}
    counts: dict[tuple[Path, str], int] = {}
    others: list[Path | BrokenRow] = []
    for path in paths:
        if (found := PART_NAME.fullmatch(path.name)) is None:
            others.append(path)
            continue
        key, number, count = (path.parent, found[1]), int(found[2]), int(found[3])
        present = series.setdefault(key, {})
        if counts.setdefault(key, count) != count or number in present:
            other = present.get(number) or next(iter(present.values()))
            raise InputError(f"{path} and {other.name} are of two editions of one split", "keep the files of one")
        present[number] = path
    return [part for key, present in series.items() for part in _parts(*key, present, counts[key])] + others


def _parts(folder: Path, split: str, present: dict[int, Path], count: int) -> list[Path | BrokenRow]:
    gone = [number for number in range(count) if number not in present]
    placed: dict[int, Path | BrokenRow] = dict(present)
    if gone:
        names = [f"{split}-{number:05}-of-{count:05}.parquet" for number in gone[:SHOWN_PARTS]]
        more = f" and {len(gone) - SHOWN_PARTS} more" if len(gone) > SHOWN_PARTS else ""
        reason = f"{len(gone)} of {count} parts are not in {folder}: {', '.join(names)}{more}"
        placed[gone[0]] = BrokenRow(names[0], reason)
    return [placed[number] for number in sorted(placed)]


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
