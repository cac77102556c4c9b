"""Shards of a job become one file again: their results joined, in the order given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import overload

from pixtral_runtime.batch.item_requests import Requests
from pixtral_runtime.batch.record_lines import RecordLines
from pixtral_runtime.batch.record_store import ANOTHER_TEMPORARY, InOrder, RecordStore, temporary_store
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.batch.results_file import setting_differences
from pixtral_runtime.batch.tables import table_format, write_table
from pixtral_runtime.errors import InputError, Option, SettingError, unwritable
from pixtral_runtime.files import Output, check_outputs


@dataclass(frozen=True)
class MergeSummary:
    """What `merge_results` made of `files`. `torn` is the number of unfinished lines left out, by file."""

    files: int
    records: int
    failed: int  # of the records, without an answer
    duplicates: int  # left out: the same answer, or an error, to what is there already
    recovered: int  # errors in one file, answered in another
    torn: dict[str, int]


def merge_results(
    paths: Sequence[Path], target: Path, force: bool = False, format: str = "jsonl", *, formulas: bool = False
) -> MergeSummary:
    """Join results files, such as those of shards, in the order given; `formulas` as in `write_table`.

    An answer takes the place of an error for the same id. Raises InputError where the files were made under different
    settings, where two answers for one id differ, and where `target` exists, unless `force` says to replace it.
    """
    table_format(target, format)
    check_outputs([Output(target, Option("output", "ANOTHER_FILE"), force)], paths)
    merged = temporary_store()
    origins: dict[str, Path] = {}  # of the records that are merged, in their order
    torn: dict[str, int] = {}
    failed = duplicates = recovered = 0
    first: tuple[Record, Path] | None = None
    for path in paths:
        for record in _last_records(path, torn):
            first = first or (record, path)
            _check_same_settings(*first, record, path)
            if record.id in origins:
                other = merged[record.id]
                _check_same_answer(other, origins[record.id], record, path)
                if other.error is None or record.error is not None:
                    duplicates += 1
                    continue
                recovered += 1
                failed -= 1
            origins[record.id] = path
            failed += record.error is not None
            _keep(merged, record)
    write_table(InOrder(merged, list(origins)), target, format, formulas=formulas)
    return MergeSummary(len(paths), len(origins), failed, duplicates, recovered, torn)


def _last_records(path: Path, torn: dict[str, int]) -> Iterator[Record]:
    """A file's records, of several for one id the last. Notes in `torn` the lines that a crash left unfinished."""
    lines = RecordLines(path)
    records = temporary_store()
    for record in lines:
        _keep(records, record)
    if lines.torn:
        torn[str(path)] = lines.torn
    yield from records.values()


def _keep(store: RecordStore, record: Record) -> None:
    try:
        store.add(record)
    except OSError as error:
        raise unwritable(Path(gettempdir()), error, ANOTHER_TEMPORARY) from error


def _check_same_settings(first: Record, first_path: Path, record: Record, path: Path) -> None:
    if changed := setting_differences(first.settings, record.settings):
        raise InputError(
            f"{path} was written under other settings than {first_path}: {changed}",
            "merge only files of one job; run the others again with the same settings",
        )


def _check_same_answer(first: Record, first_path: Path, record: Record, path: Path) -> None:
    places = f"{first_path} and {path}"
    is_answered = first.error is None and record.error is None
    if first.asked != record.asked or (is_answered and first.key != record.key):
        raise InputError(
            f"the id {record.id!r} is another question or image in {places}", "give each request an id of its own"
        )
    if is_answered and first.answer != record.answer:
        raise InputError(f"the id {record.id!r} has different answers in {places}", "merge only one of the two files")


@overload
def share_of(requests: Sequence[Request], index: int, count: int) -> Sequence[Request]: ...
@overload
def share_of(requests: Requests, index: int, count: int) -> Requests: ...
def share_of(requests: Requests, index: int, count: int) -> Requests:
    """Part `index` of `count`, from 1: every `count`-th request, so that the parts of one list never overlap."""
    return requests[index - 1 :: count]


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` is the second of four parts: (2, 4). Raises SettingError."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        second = Option("shard", "2/4", "for the second of four parts, counted from 1")
        raise SettingError(f"{text!r} is no part of a whole", second)
    return index, count
