"""Datasets in local folders: parquet as the hub publishes it, JSON lines, images as bytes and as paths."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixtral_runtime.batch.records import ImageInfo, Record
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.tables import write_table
from pixtral_runtime.errors import InputError, MachineError, PixtralError
from pixtral_runtime.evaluation.dataset import download_dataset, read_examples, read_rows
from pixtral_runtime.evaluation.judge import Rating
from pixtral_runtime.evaluation.result import Evaluation, Scored
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import BrokenRow, RowError, Task
from pixtral_runtime.evaluation.tasks.registry import TASKS, task_named

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(color: str = "red", form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, form)
    return data.getvalue()


def embedded(color: str = "red", form: str = "PNG") -> dict[str, Any]:
    return {"bytes": picture(color, form), "path": "a.png"}


def write_docvqa(path: Path, count: int = 3, start: int = 0) -> None:
    """As lmms-lab-encoder/DocVQA publishes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [str(start + n) for n in range(count)]
    columns = {
        "questionId": names, "question": [f"what is {name}?" for name in names],
        "question_types": [["form"]] * count, "image": [embedded()] * count, "docId": list(range(count)),
        "answers": [["one", "One"]] * count, "data_split": ["val"] * count,
    }  # fmt: skip
    table = pa.table({name: pa.array(v, IMAGE) if name == "image" else pa.array(v) for name, v in columns.items()})
    pq.write_table(table, path, row_group_size=2)


def of(folder: Path, task: str, limit: int | None = None) -> tuple[list[str], list[BrokenRow]]:
    found, broken = read_examples(TASKS[task], folder, ImageStore(folder / "cache", folder), limit)
    return [example.id for example in found], broken


def test_parquet_files_of_the_config_and_split_are_read_in_order(tmp_path: Path) -> None:
    write_docvqa(tmp_path / "DocVQA" / "validation-00001-of-00002.parquet", 2, 3)
    write_docvqa(tmp_path / "DocVQA" / "validation-00000-of-00002.parquet", 3, 0)
    write_docvqa(tmp_path / "DocVQA" / "test-00000-of-00001.parquet", 1, 90)
    write_docvqa(tmp_path / "InfographicVQA" / "validation-00000-of-00001.parquet", 1, 80)
    assert of(tmp_path, "docvqa") == (["0", "1", "2", "3", "4"], [])
    assert of(tmp_path, "docvqa", 4)[0] == ["0", "1", "2", "3"]
    assert of(tmp_path / "InfographicVQA", "docvqa")[0] == ["80"]


def test_images_are_written_once_and_as_they_are(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "cache", tmp_path)
    data = picture(form="JPEG")
    first, again = (store({"bytes": data, "path": None}) for _ in range(2))
    assert first == again and first.suffix == ".jpg" and first.read_bytes() == data
    other = store({"bytes": picture("blue"), "path": "same.jpg"})
    assert other.suffix == ".png" and len(list((tmp_path / "cache").iterdir())) == 2
    (tmp_path / "a.png").write_bytes(data)
    assert store("a.png") == store({"bytes": None, "path": "a.png"}) == tmp_path / "a.png"


def test_images_in_base64_are_images(tmp_path: Path) -> None:
    store, data = ImageStore(tmp_path / "cache", tmp_path), picture()
    bare = base64.b64encode(data).decode()
    wrapped = "\n".join(bare[n : n + 60] for n in range(0, len(bare), 60))  # as MIME has it
    for written in (
        bare,
        wrapped,
        f"data:image/png;base64,{bare}",
        f"DATA:;base64,{bare}",
        {"bytes": bare, "path": "x"},
    ):
        path = store(written)
        assert path.read_bytes() == data and path.suffix == ".png"


@pytest.mark.parametrize(
    "image",
    [
        "CzBVepAE6Q4zWH2ix" * 300,  # base64 of something else, and longer than a name may be
        "data:image/png;base64,AAAA",
        "data:image/png;base64,%%%",
        "data:text/plain,hello",
        "http://example.com/a.png",
        "a" * 5000,
        "a.png/b.png",
        "\0",
        "\ud800.png",
        {"bytes": "no base64", "path": None},
        {"bytes": [137, 80], "path": 3},
        ["a.png"],
    ],
)
def test_a_text_that_is_no_image_is_shown_short(tmp_path: Path, image: object) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(RowError, match=r"no image|no file") as error:
        ImageStore(tmp_path / "cache", tmp_path)(image)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(InputError, match="cache") as error:
        ImageStore(tmp_path / "cache", tmp_path)({"bytes": picture(), "path": None})
    assert [option.name for option in error.value.options] == ["cache"]


@pytest.mark.parametrize("image", [None, "", "none.png", {}, {"bytes": b"", "path": None}, 7, {"bytes": None}])
def test_a_row_without_its_image_is_refused(tmp_path: Path, image: object) -> None:
    with pytest.raises(RowError, match=r"no image|no file"):
        ImageStore(tmp_path / "cache", tmp_path)(image)


def test_broken_lines_and_rows_are_listed_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    good = {"image": "a.png", "question": "what?", "answers": ["x"]}
    twice = '{"image": "a.png", "question": "what?", "question": "who?", "answers": ["x"]}'
    rows: list[object] = [
        good,
        good | {"image": "no.png"},
        "{torn",
        [1],
        good | {"answers": []},
        good | {"id": "0"},
        twice,
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    found, broken = of(tmp_path, "custom")
    assert found == ["0"]
    reasons = [row.reason for row in broken]
    for reason, word in zip(
        reasons,
        ["no.png", "not JSON", "not an object", "answers", "was there before", "'question' is there twice"],
        strict=True,
    ):
        assert word in reason


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "?", "answers": [NaN]}',
        "null",
        "7",
        '"text"',
        '{"question": "\\ud800", "answers": "x"}',
        "[]",
        "{}",
        "{" * 9999,
    ],
)
def test_lines_that_are_no_rows_are_listed(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(
        f'{{"question": "\\ud83d\\ude00?", "answers": "x"}}\n{line}\n', encoding="utf-8"
    )
    found, broken = of(tmp_path, "custom")
    assert found == ["0"] and len(broken) == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="none of 0 rows"):
        of(tmp_path, "custom")


def own_files(folder: Path) -> None:
    """What an evaluation in the dataset's folder leaves there, and a run's table."""
    record = Record("0", "what?", "0" * 16, [ImageInfo("a.png")], answer="circle", finish_reason="stop")
    with ResultsFile.create(folder / "1.answers.jsonl") as file:
        file.append(record)
    (folder / "1.ratings.jsonl").write_text(json.dumps(asdict(Rating("0", "k", 7.0, attempts=1))) + "\n", "utf-8")
    result = Evaluation("custom", {}, [Scored("0", "what?", ("x",), answer="x", scores={"exact": 1.0})])
    result.save(folder / "1.json")
    result.save(folder / "named-by-hand.jsonl")
    write_table([record], folder / "run.parquet", "parquet")


def test_what_pixtral_wrote_is_no_dataset(tmp_path: Path) -> None:
    own_files(tmp_path)
    with pytest.raises(InputError, match="only results that pixtral wrote"):
        of(tmp_path, "custom")
    (tmp_path / "rows.jsonl").write_text('{"id": "q", "question": "what?", "answer": "hexagon"}\n', encoding="utf-8")
    assert of(tmp_path, "custom") == (["q"], [])


def test_results_with_references_added_are_a_dataset(tmp_path: Path) -> None:
    row = Record("0", "what?", "0" * 16, answer="circle").to_dict() | {"answers": ["circle"], "images": []}
    (tmp_path / "checked.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert of(tmp_path, "custom") == (["0"], [])


def test_parts_that_are_missing_are_named_where_they_would_be(tmp_path: Path) -> None:
    for number in (0, 2):
        write_docvqa(tmp_path / f"validation-{number:05}-of-00004.parquet", 2, 10 * number)
    found, broken = of(tmp_path, "docvqa")
    assert found == ["0", "1", "20", "21"]
    (row,) = broken
    assert row.id == "validation-00001-of-00004.parquet"
    assert "2 of 4 parts" in row.reason and "validation-00003-of-00004.parquet" in row.reason
    assert of(tmp_path, "docvqa", 2) == (["0", "1"], [])  # enough without them


def test_many_missing_parts_are_one_line(tmp_path: Path) -> None:
    write_docvqa(tmp_path / "validation-00000-of-99999.parquet", 1)
    _, (row,) = of(tmp_path, "docvqa")
    assert "99998 of 99999 parts" in row.reason and row.reason.endswith("99995 more")


@pytest.mark.parametrize(
    "other", ["validation-00000-of-00001.parquet", "validation-00000-of-00002-725687bf7a18d64b.parquet"]
)
def test_parts_of_two_editions_are_refused(tmp_path: Path, other: str) -> None:
    """Rows without ids would count twice."""
    for name in ("validation-00000-of-00002.parquet", "validation-00001-of-00002.parquet", other):
        write_docvqa(tmp_path / name, 1)
    with pytest.raises(InputError, match="two editions"):
        of(tmp_path, "docvqa")


def test_parts_of_json_lines_are_missed_too(tmp_path: Path) -> None:
    (tmp_path / "test-00001-of-00002.jsonl").write_text('{"question": "?", "answers": "x"}', encoding="utf-8")
    found, broken = of(tmp_path, "custom")
    assert len(found) == 1 and [row.id for row in broken] == ["test-00000-of-00002.jsonl"]


def test_parts_of_several_subjects_are_no_editions(tmp_path: Path) -> None:
    write_docvqa(tmp_path / "a" / "validation-00000-of-00001.parquet", 1)
    write_docvqa(tmp_path / "b" / "validation-00000-of-00001-725687bf7a18d64b.parquet", 1, 5)
    assert of(tmp_path, "docvqa") == (["0", "5"], [])


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    write_docvqa(tmp_path / "validation-0.parquet")
    data = (tmp_path / "validation-0.parquet").read_bytes()
    (tmp_path / "validation-0.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"validation-0.parquet cannot be read"):
        of(tmp_path, "docvqa")


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["what?"]}), tmp_path / "validation-0.parquet")
    with pytest.raises(InputError, match="no column image, answers, it has question"):
        of(tmp_path, "docvqa")


@pytest.mark.parametrize("task", ["docvqa", "chartqa", "mmmu", "custom", "easy_vqa", "mathvista", "vqav2"])
def test_a_folder_without_the_dataset_says_what_belongs_there(tmp_path: Path, task: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as error:
            of(folder, task)
        assert [option.name for option in error.value.options] == ["data"]


def test_rows_that_are_all_broken_are_an_error_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": ""}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"none of 1 rows.*question"):
        of(tmp_path, "custom")


def test_rows_are_not_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last row group that is damaged is met when its turn comes, and not before the first row."""
    path = tmp_path / "validation-0.parquet"
    write_docvqa(path, 40)
    groups = pq.ParquetFile(path).metadata
    damaged = bytearray(path.read_bytes())
    start = groups.row_group(groups.num_row_groups - 1).column(0).dictionary_page_offset
    damaged[start : start + 40] = bytes(40)
    path.write_bytes(damaged)
    monkeypatch.setattr("pixtral_runtime.evaluation.parquet_files.BATCH_ROWS", 2)
    rows = read_rows(tmp_path, TASKS["docvqa"])
    first = next(rows)
    assert isinstance(first, dict) and first["questionId"] == "0"
    with pytest.raises(InputError, match=r"validation-0\.parquet cannot be read"):
        list(rows)


def test_without_a_network_the_hint_says_how_to_fetch_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PixtralError) as error:
        download_dataset(TASKS["docvqa"])
    assert "hf download lmms-lab-encoder/DocVQA --repo-type dataset" in error.value.hint
    assert isinstance(error.value, MachineError)
    with pytest.raises(InputError, match="not on the hub"):
        download_dataset(TASKS["custom"])


def test_an_unknown_task_lists_those_that_are() -> None:
    assert isinstance(task_named("mmmu"), Task)
    with pytest.raises(InputError) as error:
        task_named("chess")
    assert "mathvista" in error.value.hint
