"""Parquet files as `datasets`, pandas and pyarrow write them, whole and damaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.sources import contents, errors, noise, picture
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.sources.data_file import LocalFile
from pixtral_runtime.sources.item import PictureData
from pixtral_runtime.sources.parquet import ParquetSource

pa = pytest.importorskip("pyarrow", reason="the extra `tables` brings it")
pq = pytest.importorskip("pyarrow.parquet")


def source(path: Path, column: str | None = None, fetch: bool = False) -> ParquetSource:
    return ParquetSource(LocalFile(str(path)), column, fetch=fetch)


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def datasets_module() -> Any:
    return pytest.importorskip("datasets", reason="writes the tables that are read here")


def test_what_datasets_writes(tmp_path: Path) -> None:
    datasets = datasets_module()
    (tmp_path / "cat.png").write_bytes(picture(9))
    features = datasets.Features(
        {"id": datasets.Value("int32"), "image": datasets.Image(), "caption": datasets.Value("string")}
    )
    rows = {
        "id": [0, 1, 2],
        "image": [
            {"bytes": picture(0), "path": "x/dog.png"},
            {"bytes": picture(1), "path": None},
            str(tmp_path / "cat.png"),
        ],
        "caption": [" a dog ", "", None],
    }
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    table = source(path)
    items = list(table)
    assert contents(items) == {f"{path}/0": [picture(0)], f"{path}/1": [picture(1)], f"{path}/2": [picture(9)]}
    assert [(item.name, item.directory, item.tags) for item in items[:2]] == [("dog", "x", "a dog"), ("1", "train", "")]
    assert items[2].name == "cat" and items[2].tags == ""
    assert table.total == 3 and table.files == (path,)
    assert [item.id for item in table] == [item.id for item in items]


def test_lists_of_pictures_are_one_item(tmp_path: Path) -> None:
    datasets = datasets_module()
    features = datasets.Features({"pages": datasets.List(datasets.Image()), "depth": datasets.Value("binary")})
    pages = [[{"bytes": picture(n), "path": f"{n}.png"} for n in range(count)] for count in (2, 1, 0)]
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"pages": pages, "depth": [b""] * 3}, features=features).to_parquet(str(path))
    found = contents(items := list(source(path)))
    assert found[f"{path}/0"] == [picture(0), picture(1)] and found[f"{path}/1"] == [picture(0)]
    assert "its list of pictures is empty" in str(found[f"{path}/2"])
    assert [str(part) for part in items[0].parts] == [f"{path}/0, picture 1", f"{path}/0, picture 2"]


STRUCT = [{"bytes": b"picture", "path": "a.png"}]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRUCT),
        pa.array(STRUCT, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
        pa.array([b"picture"]),
        pa.array([b"picture"], pa.large_binary()),
        pa.array([b"picture"], pa.binary_view()),
        pa.array([b"picture"], pa.binary(7)),
        pa.array([b"picture"]).dictionary_encode(),
        pa.array([[b"picture"]]),
        pa.array([[b"picture"]], pa.large_list(pa.binary())),
        pa.array([STRUCT]),
        pa.chunked_array([pa.array([], pa.binary()), pa.array([b"picture"])]),
    ],
    ids=lambda column: str(column.type),
)
def test_bytes_of_every_type(tmp_path: Path, column: Any) -> None:
    path = write(tmp_path / "x.parquet", {"image": column, "n": [1]})
    assert contents(source(path)) == {f"{path}/0": [b"picture"]}


def test_pandas_with_a_column_of_bytes(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="writes the table that is read here")
    path = tmp_path / "x.parquet"
    pandas.DataFrame({"JPG": [picture(0), None, picture(1)], "tags": [["a", "b"], [], None]}).to_parquet(path)
    items = list(source(path))
    assert [item.tags for item in items] == ["a, b", "", ""]
    found = contents(items)
    assert found[f"{path}/0"] == [picture(0)] and found[f"{path}/2"] == [picture(1)]
    assert found[f"{path}/1"] == [f"{path}/1: there is no picture in its row | check the table"]


def test_the_column_may_be_named_with_dots_as_well(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [b"x"], "image.b": [b"y"], "image.c": STRUCT, "mask": STRUCT})
    for column, data in (("image", b"x"), ("image.b", b"y"), ("image.c", b"picture"), ("mask", b"picture")):
        assert contents(source(path, column)) == {f"{path}/0": [data]}


@pytest.mark.parametrize(
    ("columns", "wanted", "words"),
    [
        ({"n": [1], "label": ["a"]}, None, "no column that is known for pictures, but n (int64), label (string)"),
        ({"n": [1]}, "image", "has no column image, but n (int64)"),
        ({"n": [1], "image": [1]}, "n", "the column n holds no pictures but n (int64)"),
        ({"a": STRUCT, "b": STRUCT}, None, "has pictures in a, b; of its columns name one: a (struct<"),
        ({"image": [b""], "img": [b""]}, None, "has pictures in image, img; of its columns name one: image (binary)"),
        ({"blob": [b""]}, None, "no column that is known for pictures, but blob (binary)"),
        ({f"c{n}": [1] for n in range(50)}, None, "c39 (int64) and 10 more"),
    ],
)
def test_which_column_is_not_guessed(tmp_path: Path, columns: dict[str, Any], wanted: str | None, words: str) -> None:
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(InputError) as caught:
        source(path, wanted)
    assert words in str(caught.value)
    assert caught.value.options == (Option("column", "NAME"),)


def test_what_datasets_declares_decides(tmp_path: Path) -> None:
    datasets = datasets_module()
    features = datasets.Features({"image": datasets.Value("binary"), "scan": datasets.Image()})
    path = tmp_path / "x.parquet"
    rows = {"image": [b"x"], "scan": [{"bytes": picture(1), "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    assert contents(source(path)) == {f"{path}/0": [picture(1)]}


def test_paths_lead_to_files_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    cells = ["a.png", "missing.png", "https://host/b.png", ""]
    path = write(tmp_path / "x.parquet", {"image": [{"bytes": None, "path": cell} for cell in cells], "file": cells})
    with pytest.raises(InputError, match="no column that is known"):  # a text may be anything
        source(write(tmp_path / "y.parquet", {"file": cells}))
    for column, table in (("image", source(path)), ("file", source(path, "file"))):
        assert column and contents(table)[f"{path}/0"] == [picture(1)]
        found = errors(table)
        assert f"there is no file {tmp_path}/missing.png" in found[f"{path}/1"]
        assert "nothing is fetched unasked" in found[f"{path}/2"]
        assert "there is no picture in its row" in found[f"{path}/3"]


def test_ids_go_on_over_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"png": [picture(n) for n in range(1000)]}, row_group_size=300)
    assert contents(source(path)) == {f"{path}/{n}": [picture(n)] for n in range(1000)}


def spoilt(path: Path, row_groups: Sequence[int]) -> Path:
    """Damage the first page of these row groups."""
    with path.open("r+b") as file:
        for group in row_groups:
            file.seek(pq.ParquetFile(path).metadata.row_group(group).column(0).data_page_offset)
            file.write(b"\xff" * 40)
    return path


def test_a_damaged_row_group_is_one_broken_item_and_the_rest_is_read(tmp_path: Path) -> None:
    rows = {"png": [noise(100, n) for n in range(30)]}
    path = write(tmp_path / "x.parquet", rows, row_group_size=10, use_dictionary=False)
    found = contents(source(spoilt(path, [1])))
    assert [id.removeprefix(f"{path}/") for id in found] == [*map(str, range(10)), "10-19", *map(str, range(20, 30))]
    assert found[f"{path}/29"] == rows["png"][29:]
    assert "copy or download it again" in str(found[f"{path}/10-19"])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table" * 100, b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(InputError, match="no whole Parquet file") as caught:
        source(tmp_path / "x.parquet")
    assert caught.value.hint == "download it again"


def test_a_file_that_was_cut_off_is_refused_and_a_pointer_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"png": [picture(n) for n in range(100)]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole Parquet file"):
        source(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
    with pytest.raises(InputError) as caught:
        source(path)
    assert caught.value.hint.startswith("git lfs pull")


def test_a_file_of_any_name_that_vanishes_is_one_broken_item(tmp_path: Path) -> None:
    path = write(tmp_path / os.fsdecode(b"x.parquet"), {"png": [picture(1)]})
    path = path.rename(tmp_path / os.fsdecode(b"\xff.parquet"))
    opened = source(path)
    assert contents(opened) == {f"{path}/0": [picture(1)]}
    path.unlink()
    assert list(errors(opened)) == [f"{path}#rest"]


def test_the_file_is_closed_when_nobody_goes_on(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "x.parquet", {"png": [picture(n) for n in range(1000)]}))
    before = len(os.listdir("/proc/self/fd"))
    items = iter(opened)
    assert isinstance(next(items).parts[0], PictureData)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    items.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    data = [noise(2000, n) for n in range(20_000)]
    path = write(tmp_path / "x.parquet", {"png": data}, row_group_size=len(data), use_dictionary=False)
    del data
    opened, before = source(path), pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in opened)
    assert 1 << 20 < most < 16 << 20 < path.stat().st_size / 2
