"""What tables hold of records."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from helpers.results import REQUESTS, SETTINGS, TEXTS, answered, failed
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.records import ImageInfo, Record
from pixtral_runtime.batch.tables import table_format, write_table
from pixtral_runtime.errors import InputError, MachineError


def table_of(*answers: str, schema: str | None = None) -> list[Record]:
    settings = replace(SETTINGS, json_schema=schema)
    requests = requests_of_images([Path(f"{n}.png") for n in range(len(answers))], ["What?"], None, 8)
    return [answered(request, answer, settings) for request, answer in zip(requests, answers, strict=True)]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_parquet_give_back_every_text(tmp_path: Path) -> None:
    records = table_of(*TEXTS)
    records[0].images.append(ImageInfo("second.png"))
    records.append(failed(REQUESTS[2]))
    write_table(records, tmp_path / "t.csv", "csv", formulas=True)
    write_table(records, tmp_path / "t.parquet", "parquet")
    rows, table = read_csv(tmp_path / "t.csv"), pq.read_table(tmp_path / "t.parquet")
    assert [row["answer"] for row in rows] == [*TEXTS, ""]
    assert table["answer"].to_pylist() == [*TEXTS, None]
    assert list(rows[0]) == table.column_names == [
        "id", "image", "images", "question", "answer", "finish_reason", "prompt_tokens", "image_tokens",
        "reused_tokens", "new_tokens", "image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "error",
        "hint",
    ]  # fmt: skip
    assert table.select(["id", "image", "images", "new_tokens", "vision_ms", "image_ms"]).slice(0, 1).to_pylist() == [
        {"id": "0.png", "image": "0.png", "images": 2, "new_tokens": 3, "vision_ms": 1.5, "image_ms": None}
    ]
    assert (rows[0]["decode_ms"], rows[-1]["error"]) == ("20.25", "c.png cannot be read")
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbfid,")
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.parquet"}


def test_csv_reads_the_same_in_arrow(tmp_path: Path) -> None:
    write_table(table_of(*TEXTS), tmp_path / "t.csv", "csv", formulas=True)
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(tmp_path / "t.csv", parse_options=options)
    assert table.column_names[0] == "id"
    assert table["answer"].to_pylist() == list(TEXTS)
    assert table["new_tokens"].type == pa.int64()


def test_answers_of_a_schema_become_columns_of_one_type(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [
        {"count": 2, "share": 1, "found": True, "tags": ["a", "ü"], "mixed": "x", "big": 2**70, "none": None},
        {"count": 3, "share": 0.5, "found": False, "tags": [], "mixed": 4, "late": "yes"},
    ]
    records = table_of(*map(json.dumps, values), '{"count": 9', '["no object"]', schema="sha")
    records[2].finish_reason = "length"
    write_table(records, tmp_path / "t.parquet", "parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    own = {name: table[name] for name in table.column_names if name.startswith("answer.")}
    assert {name.removeprefix("answer."): (str(column.type), column.to_pylist()) for name, column in own.items()} == {
        "count": ("int64", [2, 3, None, None]),
        "share": ("double", [1.0, 0.5, None, None]),
        "found": ("bool", [True, False, None, None]),
        "tags": ("string", ['["a", "ü"]', "[]", None, None]),
        "mixed": ("string", ['"x"', "4", None, None]),
        "big": ("string", [str(2**70), None, None, None]),
        "none": ("string", [None] * 4),
        "late": ("string", [None, "yes", None, None]),
    }
    write_table(records, tmp_path / "t.csv", "csv")
    rows = read_csv(tmp_path / "t.csv")
    assert [row["answer.found"] for row in rows] == ["true", "false", "", ""]
    assert [row["answer.tags"] for row in rows] == ['["a", "ü"]', "[]", "", ""]


def test_an_answer_nested_too_deeply_has_no_columns(tmp_path: Path) -> None:
    write_table(table_of("[" * 50_000, schema="sha"), tmp_path / "t.csv", "csv")
    assert [name for name in read_csv(tmp_path / "t.csv")[0] if name.startswith("answer.")] == []


def test_json_without_a_schema_stays_text(tmp_path: Path) -> None:
    write_table(table_of('{"count": 2}'), tmp_path / "t.csv", "csv")
    assert [name for name in read_csv(tmp_path / "t.csv")[0] if name.startswith("answer.")] == []


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    write_table([], tmp_path / "t.parquet", "parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert (table.num_rows, table["new_tokens"].type, table["decode_ms"].type) == (0, pa.int64(), pa.float64())


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_paths_that_are_no_utf8_are_written_with_escapes(tmp_path: Path, format: str) -> None:
    request = requests_of_images([Path(os.fsdecode(b"\xff.png"))], ["What?"], None, 8)[0]
    write_table([answered(request)], tmp_path / "t", format)
    rows = read_csv(tmp_path / "t") if format == "csv" else pq.read_table(tmp_path / "t").to_pylist()
    assert rows[0]["id"] == "\\udcff.png"


def test_a_format_is_wanted_or_named_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.csv", "a.PARQUET", "a.jsonl", "a.txt", "a")
    assert [table_format(Path(name)) for name in names] == ["csv", "parquet", "jsonl", "jsonl", "jsonl"]
    assert table_format(Path("a.csv"), "parquet") == "parquet"
    with pytest.raises(InputError, match="xlsx") as caught:
        table_format(Path("a"), "xlsx")
    assert "format=jsonl|csv|parquet" in caught.value.hint
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError) as missing:
        write_table([], tmp_path / "t.parquet", "parquet")
    assert missing.value.hint == "pip install 'pixtral[tables]'"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_what_a_spreadsheet_would_compute_is_written_as_text_unless_wanted(tmp_path: Path, start: str) -> None:
    text = f"{start}HYPERLINK(1)"
    record = answered(REQUESTS[0], text)
    write_table([record], tmp_path / "t.csv", "csv")
    assert read_csv(tmp_path / "t.csv")[0]["answer"] == f"'{text}"
    write_table([record], tmp_path / "t.csv", "csv", formulas=True)
    assert read_csv(tmp_path / "t.csv")[0]["answer"] == text
    write_table([record], tmp_path / "t.parquet", "parquet")
    assert pq.read_table(tmp_path / "t.parquet")["answer"].to_pylist() == [text]


def test_negative_numbers_stay_numbers(tmp_path: Path) -> None:
    write_table(table_of('{"count": -2}', schema="hash"), tmp_path / "t.csv", "csv")
    assert read_csv(tmp_path / "t.csv")[0]["answer.count"] == "-2"
