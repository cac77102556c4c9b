"""`pixtral merge`: what it joins, what it leaves out, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pixtral_cli.main import app
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.records import ImageInfo, Record, Settings, record_of
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.shards import share_of

SETTINGS = Settings("fingerprint")
REQUESTS = requests_of_images([Path(f"{n}.png") for n in range(5)], ["What?"], None, 8)
RECORDS = [
    replace(record_of(request, SETTINGS), key=str(n), answer=f"answer {n}", finish_reason="stop")
    for n, request in enumerate(REQUESTS)
]
Write = Callable[..., Path]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def without_answer(record: Record, error: str = "unreadable") -> Record:
    return replace(record, key=None, answer=None, finish_reason=None, error=error)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records to a results file of this name."""

    def written(name: str, *records: Record) -> Path:
        with ResultsFile.create(tmp_path / name) as file:
            for record in records:
                file.append(record)
        return tmp_path / name

    return written


@pytest.fixture
def shards(write: Write) -> list[Path]:
    ids = {record.id: record for record in RECORDS}
    return [write(f"{i}.jsonl", *(ids[r.id] for r in share_of(REQUESTS, i, 2))) for i in (1, 2)]


def merged(path: Path) -> list[Record]:
    return list(read_results(path).records.values())


def test_shards_become_one_file_in_the_order_given(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "all.jsonl"
    done = invoke(*shards, "-o", out)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"5 records of 2 files, 0 of them without an answer, are in {out}" in done.stderr
    assert merged(out) == RECORDS[::2] + RECORDS[1::2]
    assert invoke(*shards[::-1], "-o", tmp_path / "back.jsonl").exit_code == 0
    assert merged(tmp_path / "back.jsonl") == RECORDS[1::2] + RECORDS[::2]


def test_json_counts_what_was_done(write: Write, tmp_path: Path) -> None:
    again = replace(RECORDS[1], times_ms={"decode": 5.0})
    files = [
        write("a.jsonl", without_answer(RECORDS[0]), RECORDS[1], without_answer(RECORDS[2])),
        write("b.jsonl", again, RECORDS[0], without_answer(RECORDS[2], "still unreadable")),
        write("c.jsonl"),
    ]
    done = invoke(*files, "-o", tmp_path / "all", "--json")
    assert json.loads(done.stdout) == {
        "files": 3, "records": 3, "failed": 1, "duplicates": 2, "recovered": 1, "torn": {},
        "output": str(tmp_path / "all"), "format": "jsonl",
    }  # fmt: skip
    assert merged(tmp_path / "all") == [RECORDS[0], RECORDS[1], without_answer(RECORDS[2])]


def test_an_answer_is_not_given_up_for_a_later_error(write: Write, tmp_path: Path) -> None:
    files = [write("a.jsonl", RECORDS[0]), write("b.jsonl", without_answer(RECORDS[0]))]
    assert invoke(*files, "-o", tmp_path / "all.jsonl").exit_code == 0
    assert merged(tmp_path / "all.jsonl") == [RECORDS[0]]


def test_a_torn_end_is_left_out_and_told(shards: list[Path], tmp_path: Path) -> None:
    torn = shards[0].read_bytes() + b'{"id": "9.png", "que'
    shards[0].write_bytes(torn)
    done = invoke(*shards, "-o", tmp_path / "all.jsonl", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["torn"] == {str(shards[0]): 1}
    assert f"warning: {shards[0]}: 1 unfinished" in done.stderr
    assert len(merged(tmp_path / "all.jsonl")) == 5
    assert shards[0].read_bytes() == torn


@pytest.mark.parametrize("name", ["all.csv", "all.parquet", "all.tsv"])
def test_the_name_or_the_option_chooses_the_format(shards: list[Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    option = ["--format", "csv"] if name.endswith("tsv") else []
    assert invoke(*shards, "-o", out, *option).exit_code == 0
    if name.endswith("parquet"):
        answers = pq.read_table(out)["answer"].to_pylist()
    else:
        with out.open(encoding="utf-8-sig", newline="") as file:
            answers = [row["answer"] for row in csv.DictReader(file)]
    assert answers == [f"answer {n}" for n in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(RECORDS[0], answer="another"), "the id '0.png' has different answers in"),
        (replace(RECORDS[0], key="other"), "the id '0.png' is another question or image in"),
        (replace(RECORDS[0], asked="other"), "the id '0.png' is another question or image in"),
        (replace(without_answer(RECORDS[0]), asked="other"), "the id '0.png' is another question or image in"),
        (replace(RECORDS[1], settings=RECORDS[1].settings | {"seed": 7}), "seed was 0 and is 7"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    write: Write, tmp_path: Path, changed: Record, words: str
) -> None:
    files = [write("a.jsonl", RECORDS[0]), write("b.jsonl", changed)]
    done = invoke(*files, "-o", tmp_path / "all.jsonl")
    assert done.exit_code == 3
    assert words in done.stderr
    assert all(str(file) in done.stderr for file in files)
    assert "hint: " in done.stderr
    assert not (tmp_path / "all.jsonl").exists()


def test_an_existing_output_is_kept_unless_forced(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "all.jsonl"
    out.write_text("precious")
    done = invoke(*shards, "-o", out)
    assert done.exit_code == 3
    assert "--force" in done.stderr
    assert out.read_text() == "precious"
    assert invoke(*shards, "-o", out, "--force").exit_code == 0
    assert len(merged(out)) == 5
    assert invoke(*shards, "-o", tmp_path, "--force").exit_code == 3


def test_a_file_is_never_merged_into_itself(shards: list[Path]) -> None:
    before = shards[0].read_bytes()
    assert invoke(*shards, "-o", shards[0], "--force").exit_code == 3
    assert shards[0].read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl", "-o", "OUT"], "cannot be read"),
        (["NOTES", "-o", "OUT"], "is no results file: line 1"),
        (["SHARD", "-o", "SHARD/all.jsonl"], "cannot be written"),
        (["SHARD", "-o", "OUT", "--format", "webdataset"], "shards of WebDataset hold pictures"),
        (["SHARD", "-o", "OUT", "--format", "xlsx"], "--format jsonl|csv|parquet"),
    ],
)
def test_what_cannot_be_used_is_refused(shards: list[Path], tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "notes.txt").write_text("notes\n")
    places = {"OUT": tmp_path / "out.jsonl", "NOTES": tmp_path / "notes.txt", "SHARD": shards[0]}
    done = invoke(*(str(places.get(a, a)).replace("SHARD", str(shards[0])) for a in arguments))
    assert done.exit_code == 3
    assert words in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_pictures_stay_with_their_answers(write: Write, tmp_path: Path) -> None:
    record = replace(RECORDS[0], images=[ImageInfo("0.png", "ab", 3, 4), ImageInfo("1.png")])
    assert invoke(write("a.jsonl", record), "-o", tmp_path / "all.jsonl").exit_code == 0
    assert merged(tmp_path / "all.jsonl") == [record]
