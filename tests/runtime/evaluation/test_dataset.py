"""Datasets in local folders: parquet as the hub publishes it, JSON lines, images as bytes and as paths."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixtral_runtime.errors import InputError, MachineError, PixtralError
from pixtral_runtime.evaluation.dataset import ImageStore, download_dataset, read_examples, read_rows
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
    """As lmms-lab/DocVQA publishes it."""
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


@pytest.mark.parametrize("image", [None, "", "none.png", {}, {"bytes": b"", "path": None}, 7, {"bytes": None}])
def test_a_row_without_its_image_is_refused(tmp_path: Path, image: object) -> None:
    with pytest.raises(RowError, match=r"no image|no file"):
        ImageStore(tmp_path / "cache", tmp_path)(image)


def test_broken_lines_and_rows_are_listed_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    good = {"image": "a.png", "question": "what?", "answers": ["x"]}
    rows: list[object] = [good, good | {"image": "no.png"}, "{torn", [1], good | {"answers": []}, good | {"id": "0"}]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    found, broken = of(tmp_path, "custom")
    assert found == ["0"]
    reasons = [row.reason for row in broken]
    for reason, word in zip(
        reasons, ["no.png", "not JSON", "not an object", "answers", "was there before"], strict=True
    ):
        assert word in reason


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
    with pytest.raises(InputError, match=r"none of 1 rows.*answers"):
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
    monkeypatch.setattr("pixtral_runtime.evaluation.dataset.BATCH_ROWS", 2)
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
    assert "hf download lmms-lab/DocVQA --repo-type dataset" in error.value.hint
    assert isinstance(error.value, MachineError)
    with pytest.raises(InputError, match="not on the hub"):
        download_dataset(TASKS["custom"])


def test_an_unknown_task_lists_those_that_are() -> None:
    assert isinstance(task_named("mmmu"), Task)
    with pytest.raises(InputError) as error:
        task_named("chess")
    assert "mathvista" in error.value.hint
