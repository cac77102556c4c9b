"""Records in other formats: CSV and Parquet for spreadsheets and data frames, a row a record.

OpenAI's batch output, the captions of Hugging Face's ImageFolder and WebDataset have files of their own. Nothing here
holds more than some rows in memory: what is written is read once for its columns, and once for its rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from pixtral_runtime.batch.asked_pictures import AnsweredRequests
from pixtral_runtime.batch.imagefolder import write_imagefolder
from pixtral_runtime.batch.openai_output import SUFFIX, write_openai_output
from pixtral_runtime.batch.parquet_table import write_parquet, write_parquet_with_pictures
from pixtral_runtime.batch.record_lines import ANOTHER_OUTPUT, write_records
from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.table_columns import TableColumns
from pixtral_runtime.errors import Option, SettingError, extra_missing, unwritable
from pixtral_runtime.files import replacing

RESULTS_FORMATS = ("jsonl", "csv", "parquet", "openai", "imagefolder")  # which need no pictures
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - as wide ones count too


def table_format(path: Path, wanted: str | None = None) -> str:
    """The format to write: as wanted, or as the name ends; JSONL where that says nothing.

    Raises SettingError for an unknown format, MachineError where Parquet's package is missing.
    """
    suffix = "openai" if path.name.lower().endswith(SUFFIX) else path.suffix.removeprefix(".").lower()
    format = wanted or (suffix if suffix in RESULTS_FORMATS else "jsonl")
    if format == "webdataset":
        raise SettingError(
            "shards of WebDataset hold pictures, and results files do not",
            "let the run that asks about them write its shards; those of several runs are one data set side by side",
        )
    if format not in RESULTS_FORMATS:
        raise SettingError(f"there is no format {format!r}", Option("format", tuple(RESULTS_FORMATS)))
    if format == "parquet" and find_spec("pyarrow") is None:
        raise extra_missing("pyarrow", "tables", "Writing Parquet")
    return format


def write_table(
    records: Collection[Record],
    path: Path,
    format: str,
    *,
    formulas: bool = False,
    answered: AnsweredRequests | None = None,
) -> None:
    """Write records as a table with a row each, in their order; replaces the file whole. Raises as `table_format`.

    JSON objects that a schema made become columns of their own, `answer.NAME`. CSV is UTF-8 with a byte order mark, as
    Excel wants it. Its texts that a spreadsheet would compute get an apostrophe in front, unless `formulas` leaves them
    as they are: a picture may have the model write what fetches an address, or runs a program. With `answered`, the
    requests that the records answer, Parquet holds their pictures.
    """
    table_format(path, format)
    if format == "jsonl":
        return write_records(path, records)
    if format == "openai":
        return write_openai_output(records, path)
    if format == "imagefolder":
        return write_imagefolder(records, path)
    columns = TableColumns(records)
    try:
        with replacing(path) as file:
            if format == "csv":
                _write_csv(columns, records, file, formulas)
            elif answered is None:
                write_parquet(columns, records, file)
            else:
                write_parquet_with_pictures(columns, answered, file)
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error


def _write_csv(columns: TableColumns, records: Iterable[Record], file: IO[bytes], formulas: bool) -> None:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    writer = csv.writer(text)
    writer.writerow(columns.types)
    for record in records:
        writer.writerow([_cell(value, formulas) for value in columns.row(record).values()])
    text.detach()  # flushes, and leaves the file open


def _cell(value: Any, formulas: bool) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula and not formulas else value
