"""The files that a dataset is split into, `test-00001-of-00003.parquet` and such, and those that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.task import BrokenRow

PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?(\.\w+)")
SHOWN_PARTS = 3

Series = tuple[Path, str, str]
"""Folder, split and suffix: what the parts of one whole have in common."""


def with_gaps(paths: Iterable[Path]) -> list[Path | BrokenRow]:
    """Files in order, and what is missing in the place of its first part. Raises InputError for parts of two editions:
    their rows would count twice."""
    series: dict[Series, dict[int, Path]] = {}
    counts: dict[Series, int] = {}
    others: list[Path | BrokenRow] = []
    for path in paths:
        if (found := PART_NAME.fullmatch(path.name)) is None:
            others.append(path)
            continue
        key, number, count = (path.parent, found[1], found[4]), int(found[2]), int(found[3])
        present = series.setdefault(key, {})
        if counts.setdefault(key, count) != count or number in present:
            other = present.get(number) or next(iter(present.values()))
            raise InputError(f"{path} and {other.name} are of two editions of one split", "keep the files of one")
        present[number] = path
    return [part for key, present in series.items() for part in _in_order(key, present, counts[key])] + others


def _in_order(series: Series, present: Mapping[int, Path], count: int) -> list[Path | BrokenRow]:
    folder, split, suffix = series
    gone = [number for number in range(count) if number not in present]
    placed: dict[int, Path | BrokenRow] = dict(present)
    if gone:
        names = [f"{split}-{number:05}-of-{count:05}{suffix}" for number in gone[:SHOWN_PARTS]]
        more = f" and {len(gone) - SHOWN_PARTS} more" if len(gone) > SHOWN_PARTS else ""
        reason = f"{len(gone)} of {count} parts are not in {folder}: {', '.join(names)}{more}"
        placed[gone[0]] = BrokenRow(names[0], reason)
    return [placed[number] for number in sorted(placed)]
