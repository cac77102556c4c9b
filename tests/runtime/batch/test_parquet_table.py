"""Parquet with the pictures themselves, as `datasets` write it, and row groups of a size that memory holds."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.answers import answered
from helpers.places import IMAGES
from helpers.results import failed
from pixtral_runtime.batch import parquet_table
from pixtral_runtime.batch.asked_pictures import AnsweredRequests
from pixtral_runtime.batch.record_store import InOrder
from pixtral_runtime.batch.records import Request
from pixtral_runtime.batch.tables import write_table
from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture, user_message
from pixtral_runtime.sources.item import PictureData

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package 'datasets'")
FILES = sorted(IMAGES.glob("*_64x64.png"))


def asked(id: str, *pictures: Path | StoredPicture) -> Request:
    return Request(id, user_message("What?", pictures))


def written(all: AnsweredRequests, path: Path) -> pq.ParquetFile:
    records = InOrder(all.records, [request.id for request, _ in all])
    write_table(records, path, "parquet", answered=all)
    return pq.ParquetFile(path)


def loaded(path: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


@needs_datasets
def test_datasets_read_pictures_as_pictures_and_what_was_none_as_nothing(tmp_path: Path) -> None:
    from datasets import Image as ImageFeature

    page = PictureData(name="scan.pdf#page=1", data=b"P6\n1 1\n255\n\x01\x02\x03")
    all = answered([*(asked(file.name, file) for file in FILES), asked("page", page), asked("words")])
    broken = asked("broken.png", Path("broken.png"))
    all = AnsweredRequests([*all.requests, broken], dict(all.records) | {broken.id: failed(broken)})
    written(all, tmp_path / "t.parquet")
    data = loaded(tmp_path / "t.parquet")
    assert data.features["image"] == ImageFeature()
    assert {name: data.features[name].dtype for name in ("id", "images", "vision_ms", "answer")} == {
        "id": "string", "images": "int64", "vision_ms": "float64", "answer": "string",
    }  # fmt: skip
    for row, file in zip(data, FILES, strict=False):
        with Image.open(file) as picture:
            assert (row["image"].tobytes(), row["answer"]) == (picture.convert("RGB").tobytes(), f"About {file.name}.")
    page_row, words, wrong = list(data)[len(FILES) :]
    assert (page_row["image"].format, page_row["image"].getpixel((0, 0))) == ("PNG", (1, 2, 3))
    assert (words["image"], words["images"], wrong["image"]) == (None, 0, None)
    assert wrong["error"] == "broken.png cannot be read"
    stored = pq.read_table(tmp_path / "t.parquet")["image"].to_pylist()
    assert stored[0] == {"bytes": FILES[0].read_bytes(), "path": str(FILES[0])}


@needs_datasets
def test_several_pictures_of_any_request_make_lists_of_all(tmp_path: Path) -> None:
    all = answered([asked("one", FILES[0]), asked("two", *FILES[:2]), asked("none")])
    written(all, tmp_path / "t.parquet")
    assert [[picture.size for picture in row["image"]] for row in loaded(tmp_path / "t.parquet")] == [
        [(64, 64)], [(64, 64), (64, 64)], [],
    ]  # fmt: skip


def test_groups_of_rows_end_after_so_many_rows_or_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all = answered([asked(str(n), FILES[0]) for n in range(7)])

    def groups() -> list[int]:
        found = written(all, tmp_path / "t.parquet").metadata
        return [found.row_group(n).num_rows for n in range(found.num_row_groups)]

    monkeypatch.setattr(parquet_table, "ROWS_OF_PICTURES", 3)
    assert groups() == [3, 3, 1]
    monkeypatch.setattr(parquet_table, "GROUP_BYTES", len(FILES[0].read_bytes()) + 1)
    assert groups() == [2, 2, 2, 1]


def test_a_picture_that_changed_leaves_the_table_of_before(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(FILES[0].read_bytes())
    all = answered([asked("a", picture)])
    before = written(all, tmp_path / "t.parquet").metadata.num_rows
    data = (tmp_path / "t.parquet").read_bytes()
    other = io.BytesIO()
    Image.new("RGB", (5, 5)).save(other, "PNG")
    picture.write_bytes(other.getvalue())
    with pytest.raises(ImageError, match=r"a\.png: it has changed since it was asked about"):
        written(all, tmp_path / "t.parquet")
    assert (before, (tmp_path / "t.parquet").read_bytes()) == (1, data)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "t.parquet"}
