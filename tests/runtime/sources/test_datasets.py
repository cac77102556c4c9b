"""What names mean: folders that `datasets` saved, check-outs, globs, ranges, and what is no data set."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from helpers.sources import contents, errors, picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.datasets import expand_braces, open_dataset
from pixtral_runtime.sources.item import Source


def opened(name: str | Path, **options: Any) -> Source:
    source = open_dataset(str(name), **options)
    assert source is not None
    return source


def write_tar(path: Path, *numbers: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            info = tarfile.TarInfo(f"{n}.png")
            info.size = len(picture(n))
            tar.addfile(info, io.BytesIO(picture(n)))
    return path


def hugging_face(count: int, first: int = 0) -> Any:
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read here")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": picture(first + n), "path": f"{n}.png"} for n in range(count)], "label": [0] * count}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_data_set_that_datasets_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hugging_face(5).save_to_disk("photos", num_shards=2)
    source = opened("photos/")
    found = list(contents(source).items())
    assert [parts for _, parts in found] == [[picture(n)] for n in range(5)]
    assert [id for id, _ in found] == [
        *(f"photos/data-00000-of-00002.arrow/{n}" for n in range(3)),
        *(f"photos/data-00001-of-00002.arrow/{n}" for n in range(2)),
    ]
    assert source.total == 5 and [file.name for file in source.files] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    assert [item.name for item in source] == ["0", "1", "2", "3", "4"]


def test_of_a_filtered_data_set_what_is_left_is_read(tmp_path: Path) -> None:
    hugging_face(10).select([7, 2]).save_to_disk(str(tmp_path / "x"))
    assert list(contents(opened(tmp_path / "x")).values()) == [[picture(7)], [picture(2)]]


def test_the_splits_of_a_saved_data_set_are_in_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read here")
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict(train=hugging_face(2), test=hugging_face(1, 5)).save_to_disk("all")
    assert contents(opened("all")) == {
        "all/train/data-00000-of-00001.arrow/0": [picture(0)],
        "all/train/data-00000-of-00001.arrow/1": [picture(1)],
        "all/test/data-00000-of-00001.arrow/0": [picture(5)],
    }
    assert list(contents(opened("all/test")).values()) == [[picture(5)]]


def test_a_check_out_of_a_repository(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    hugging_face(2).to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    hugging_face(1, 5).to_parquet(str(tmp_path / "data" / "test-00000-of-00001.parquet"))
    (tmp_path / "README.md").write_text("---\n")
    source = opened(tmp_path)
    assert [id.removeprefix(f"{tmp_path}/data/") for id in contents(source)] == [
        "test-00000-of-00001.parquet/0", "train-00000-of-00001.parquet/0", "train-00000-of-00001.parquet/1",
    ]  # fmt: skip
    assert source.total == 3
    assert opened(tmp_path / "data").total == 3


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("state.json", "{", "is not what `datasets` writes"),
        ("state.json", '{"_data_files": [1]}', "is not what `datasets` writes"),
        ("state.json", "[]", "is not what `datasets` writes"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "No such file"),
    ],
)
def test_a_saved_data_set_that_is_damaged_is_refused(tmp_path: Path, file: str, text: str, words: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=words):
        opened(tmp_path)


def test_a_saved_data_set_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    hugging_face(1).save_to_disk(str(tmp_path / "other"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "state.json").write_text('{"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}')
    with pytest.raises(InputError, match=r"x/data-00000-of-00001\.arrow cannot be read: No such file"):
        opened(tmp_path / "x")


def test_globs_and_ranges_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in range(12):
        write_tar(Path(f"s-{n:03d}.tar"), n)
    wanted = [[picture(n)] for n in range(12)]
    for name in ("s-*.tar", "s-{000..011}.tar", ".", str(tmp_path)):
        source = opened(name)
        assert list(contents(source).values()) == wanted
        assert source.total is None and len(source.files) == 12
    assert list(contents(opened("s-{003,005}.tar"))) == ["s-003.tar/3.png", "s-005.tar/5.png"]
    with pytest.raises(InputError, match=r"s-012\.tar cannot be read: No such file"):
        opened("s-{010..012}.tar")


def test_braces_in_the_name_of_a_file_that_is_there(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a{1..3}.tar", 1)
    assert list(contents(opened(path))) == [f"{path}/1.png"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{}.tar", ["a{}.tar"]),
        ("a{1}.tar", ["a{1}.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("s3://b/{0,1}.tar", ["s3://b/0.tar", "s3://b/1.tar"]),
    ],
)
def test_what_braces_mean(name: str, names: list[str]) -> None:
    assert expand_braces(name) == names


def test_braces_beyond_all_measure_are_refused() -> None:
    for name in ("{0..99999999999}.tar", "{1..999}{1..999}"):
        with pytest.raises(InputError, match="more than 100,000"):
            expand_braces(name)


def test_every_kind_of_file_is_known_by_its_suffix(tmp_path: Path) -> None:
    hugging_face(1).save_to_disk(str(tmp_path / "saved"))
    hugging_face(1).to_parquet(str(tmp_path / "x.PARQUET"))
    shutil.copy(write_tar(tmp_path / "x.tar", 0), tmp_path / "X.TAR")
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "x.tsv").write_text("n\tview\n1\t0.png\n")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("0.png", picture(0))
    for name in ("saved", "saved/data-00000-of-00001.arrow", "x.PARQUET", "x.tar", "X.TAR", "x.zip"):
        assert list(contents(opened(tmp_path / name)).values()) == [[picture(0)]]
    assert list(contents(opened(tmp_path / "x.tsv", column="view")).values()) == [[picture(0)]]


def test_what_is_no_data_set_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "metadata.parquet").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    hugging_face(1).to_parquet(str(tmp_path / "sub" / "metadata.parquet"))
    for name in ("", "0.png", "sub", "*.png", "none.png", "none", "{a,b}.png", "a\0b"):
        assert open_dataset(f"{tmp_path}/{name}") is None


def test_a_folder_of_pictures_stays_one_whatever_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    write_tar(tmp_path / "more.tar", 1)
    assert open_dataset(str(tmp_path)) is None
    with pytest.raises(InputError, match=r"means data sets, but .*0\.png is none"):
        open_dataset(f"{tmp_path}/*")


def test_empty_tables_among_others_are_passed_and_alone_refused(tmp_path: Path) -> None:
    hugging_face(2).to_parquet(str(tmp_path / "a.parquet"))
    hugging_face(2).select([]).to_parquet(str(tmp_path / "b.parquet"))
    assert opened(tmp_path).total == 2
    with pytest.raises(InputError, match="has no rows"):
        opened(tmp_path / "b.parquet")


def test_a_name_in_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    hugging_face(1).save_to_disk(str(tmp_path / "x"))
    (tmp_path / "x").rename(folder)
    write_tar(folder / "s.tar", 1)
    assert list(contents(opened(folder)).values()) == [[picture(0)]]
    assert opened(folder).total in (1, None)
    assert list(contents(opened(folder / "s.tar"))) == [f"{folder}/s.tar/1.png"]


def test_a_broken_shard_does_not_end_those_behind_it(tmp_path: Path) -> None:
    for n in range(3):
        write_tar(tmp_path / f"{n}.tar", n)
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:1024])
    source = opened(tmp_path)
    assert [parts[0] for parts in contents(source).values() if isinstance(parts[0], bytes)] == [
        picture(n) for n in range(3)
    ]
    assert list(errors(source)) == [f"{tmp_path}/1.tar#rest"]
