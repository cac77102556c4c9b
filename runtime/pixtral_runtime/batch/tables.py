"""Records in other formats: CSV and Parquet for spreadsheets and data frames, a row a record.

OpenAI's batch output and the captions of Hugging Face's ImageFolder have files of their own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.imagefolder import write_imagefolder
from pixtral_runtime.batch.openai_output import SUFFIX, write_openai_output
from pixtral_runtime.batch.record_lines import ANOTHER_OUTPUT, write_records
from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import Option, SettingError, extra_missing, unwritable
from pixtral_runtime.files import replacing

RESULTS_FORMATS = ("jsonl", "csv", "parquet", "openai", "imagefolder")
STAGE_COLUMNS = (
    "image",
    "preprocess",
    "vision",
    "prefill",
    "decode",
)  # columns of a table even where no record has them
COUNT_COLUMNS = ("images", "prompt_tokens", "image_tokens", "reused_tokens", "new_tokens")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - as wide ones count too
LARGEST_EXACT_INTEGER = 2**53  # 64-bit floats hold whole numbers below


def table_format(path: Path, wanted: str | None = None) -> str:
    """The format to write: as wanted, or as the name ends; JSONL where that says nothing.

    Raises SettingError for an unknown format, MachineError where Parquet's package is missing.
    """
    suffix = "openai" if path.name.lower().endswith(SUFFIX) else path.suffix.removeprefix(".").lower()
    format = wanted or (suffix if suffix in RESULTS_FORMATS else "jsonl")
    if format not in RESULTS_FORMATS:
        raise SettingError(f"there is no format {format!r}", Option("format", tuple(RESULTS_FORMATS)))
    if format == "parquet" and find_spec("pyarrow") is None:
        raise extra_missing("pyarrow", "tables", "Writing Parquet")
    return format


def write_table(records: Iterable[Record], path: Path, format: str, *, formulas: bool = False) -> None:
    """Write records as a table with a row each, in their order; replaces the file whole. Raises as `table_format`.

    JSON objects that a schema made become columns of their own, `answer.NAME`. CSV is UTF-8 with a byte order mark, as
    Excel wants it. Its texts that a spreadsheet would compute get an apostrophe in front, unless `formulas` leaves them
    as they are: a picture may have the model write what fetches an address, or runs a program.
    """
    table_format(path, format)
    if format == "jsonl":
        return write_records(path, records)
    if format == "openai":
        return write_openai_output(records, path)
    if format == "imagefolder":
        return write_imagefolder(records, path)
    columns = _columns(list(records))
    try:
        with replacing(path) as file:
            if format == "csv":
                _write_csv(columns, file, formulas)
            else:
                _write_parquet(columns, file)
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error


def _write_csv(columns: Mapping[str, Sequence[Any]], file: io.BufferedWriter, formulas: bool) -> None:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_cell(value, formulas) for value in row])
    text.detach()  # flushes, and leaves the file open


def _cell(value: Any, formulas: bool) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula and not formulas else value


def _write_parquet(columns: Mapping[str, Sequence[Any]], file: io.BufferedWriter) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    fixed = dict.fromkeys(COUNT_COLUMNS, int) | {
        f"{stage}_ms": float for stage in STAGE_COLUMNS
    }  # even where all are missing
    arrays = {}
    for name, values in columns.items():
        kind = fixed.get(name) or next((type(value) for value in values if value is not None), str)
        arrays[name] = pa.array(values, types[kind])
    pq.write_table(pa.table(arrays), file)


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The table by column: text, numbers or None."""
    stages = dict.fromkeys((*STAGE_COLUMNS, *(stage for record in records for stage in record.times_ms)))
    answers = [_structured(record) for record in records]
    columns: dict[str, list[Any]] = {
        "id": [r.id for r in records],
        "image": [r.images[0].path if r.images else None for r in records],
        "images": [len(r.images) for r in records],
        "question": [r.question for r in records],
        "answer": [r.answer for r in records],
        "finish_reason": [r.finish_reason for r in records],
    }
    if any(r.thinking is not None for r in records):
        columns["thinking"] = [r.thinking for r in records]
    columns |= {name: [getattr(r, name) for r in records] for name in COUNT_COLUMNS if name not in columns}
    columns |= {f"{stage}_ms": _uniform([r.times_ms.get(stage) for r in records]) for stage in stages}
    columns |= {"error": [r.error for r in records], "hint": [r.hint for r in records]}
    properties = dict.fromkeys(name for answer in answers for name in answer)
    columns |= {f"answer.{name}": _uniform([answer.get(name) for answer in answers]) for name in properties}
    return {_encodable(name): [_encodable(v) if isinstance(v, str) else v for v in c] for name, c in columns.items()}


def _structured(record: Record) -> dict[str, Any]:
    """The properties of an answer that a schema made; none for other answers, and for one that was cut short."""
    is_structured = any((said or {}).get("json_schema") for said in (record.own, record.settings))
    if record.answer is None or record.finish_reason != "stop" or not is_structured:
        return {}
    try:
        answer = json.loads(record.answer)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _uniform(values: Sequence[Any]) -> list[Any]:
    """Values of one type, missing ones aside: booleans, whole numbers, numbers or text; or else each as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    is_exact = all(abs(value) < LARGEST_EXACT_INTEGER for value in values if type(value) is int)
    if kinds == {int, float} and is_exact:
        return [None if value is None else float(value) for value in values]
    if kinds in ({bool}, {float}, {str}) or (kinds == {int} and is_exact):
        return list(values)
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def _encodable(text: str) -> str:
    """Text for UTF-8: bytes of a path that are none become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
