"""CSV and TSV of spreadsheets, scripts and pandas that name pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.sources import contents, errors, picture
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.sources.data_file import LocalFile
from pixtral_runtime.sources.listed import ListSource
from pixtral_runtime.sources.remote import RemotePicture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `lists` in the working folder, with two pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists" / "sub").mkdir(parents=True)
    (tmp_path / "lists" / "a.png").write_bytes(picture(1))
    (tmp_path / "lists" / "sub" / "b, c.png").write_bytes(picture(2))
    return Path("lists")


def source(path: Path, text: str | bytes, column: str | None = None, fetch: bool = False) -> ListSource:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ListSource(LocalFile(str(path)), column, fetch=fetch)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", 'id,path\n1,a.png\n2,"sub/b, c.png"\n'),
        ("l.csv", '\ufeffPath;id\r\na.png;1\r\n"sub/b, c.png";2\r\n'),
        ("l.csv", "file_name\tid\na.png\t1\nsub/b, c.png\t2"),
        ("l.tsv", "image\tid,x,y\na.png\t1\n\nsub/b, c.png\t2\n"),
        ("L.CSV", 'filename,note\na.png,"two\nlines"\n"sub/b, c.png",\n'),
    ],
)
def test_pictures_of_a_list_are_found_beside_it(folder: Path, name: str, text: str) -> None:
    listed = source(folder / name, text)
    items = list(listed)
    assert contents(items) == {"lists/a.png": [picture(1)], "lists/sub/b, c.png": [picture(2)]}
    assert [(item.name, item.directory, item.tags) for item in items] == [("a", "lists", None), ("b, c", "sub", None)]
    assert listed.total == 2 and listed.files == (folder / name,)
    assert [item.parts for item in listed] == [item.parts for item in items]


def test_a_list_of_pandas_with_texts(folder: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="writes the list that is read here")
    rows = {"text": ['a "quoted" one', "zwei\nZeilen"], "image": ["a.png", str((folder / "a.png").absolute())]}
    pandas.DataFrame(rows).to_csv(folder / "l.csv")
    items = list(ListSource(LocalFile("lists/l.csv")))
    assert [item.tags for item in items] == rows["text"]
    assert [item.id for item in items] == ["lists/a.png", str((folder / "a.png").absolute())]


def test_the_column_may_be_named(folder: Path) -> None:
    text = "path,Front view\nnothing.png,a.png\n"
    assert contents(source(folder / "l.csv", text, "Front view")) == {"lists/a.png": [picture(1)]}
    text = "image,image_path\nx,a.png\n"
    assert contents(source(folder / "l.csv", text, "image_path")) == {"lists/a.png": [picture(1)]}


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("id,name\n1,a.png\n", None, "no column that is known for pictures; its columns: id, name"),
        ("image,path\n1,a.png\n", None, "2 columns for pictures; its columns: image, path"),
        ("image,path\n1,a.png\n", "foto", "no column foto; its columns: image, path"),
        ("x,x\n1,a.png\n", "x", "2 column x; its columns: x, x"),
        ("", None, "no column that is known for pictures; its columns: "),
    ],
)
def test_which_column_is_not_guessed(folder: Path, text: str, column: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        source(folder / "l.csv", text, column)
    assert caught.value.options == (Option("column", "NAME"),)


def test_rows_that_name_no_picture_are_said_by_their_line(folder: Path) -> None:
    text = "path,n\na.png,1\n,2\n  ,\nsub/b, c.png,4\nmissing.png,5,,\na.png,6\n"
    found = contents(source(folder / "l.csv", text))
    assert found == {
        "lists/a.png": [picture(1)],
        "lists/l.csv#line=3": ["lists/l.csv, line 3: it names no picture | correct the line"],
        "lists/l.csv#line=4": ["lists/l.csv, line 4: it names no picture | correct the line"],
        "lists/l.csv#line=5": [
            "lists/l.csv, line 5: it has 3 cells, the header 2; a separator within a cell needs quotes around it"
            " | correct the line"
        ],
        "lists/missing.png": ["lists/missing.png: No such file or directory | check the path and its permissions"],
        "lists/a.png (2)": [picture(1)],
    }


def test_bytes_that_are_no_text_are_refused_and_a_zero_byte_is_one_broken_row(folder: Path) -> None:
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        source(folder / "l.csv", b"path\n\xff.png\n")
    with pytest.raises(InputError, match="UTF-16"):
        source(folder / "l.csv", "path\na.png".encode("utf-16"))
    assert "zero byte" in next(iter(errors(source(folder / "l.csv", "path\na\0.png\na.png\n")).values()))


@pytest.mark.parametrize("text", ["path\n", "path\n\n\n", "path,b\n\n"])
def test_a_list_of_no_rows_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match="has no rows"):
        source(folder / "l.csv", text)


def test_a_cell_beyond_all_measure_is_refused_by_its_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"line 3: field larger than"):
        source(folder / "l.csv", "path\na.png\n" + "x" * 200_000)


def test_a_list_in_a_folder_of_any_name(folder: Path) -> None:
    odd = folder / os.fsdecode(b"\xff\xfe")
    odd.mkdir()
    (odd / "a.png").write_bytes(picture(3))
    assert contents(source(odd / "l.csv", "path\na.png\n")) == {f"{odd}/a.png": [picture(3)]}


def test_addresses_are_not_fetched_unasked(folder: Path) -> None:
    text = "image_url,caption\nhttps://host/x.jpg?s=1,\na.png,one\n"
    found = contents(source(folder / "l.csv", text))
    assert found["lists/a.png"] == [picture(1)]
    assert "nothing is fetched unasked | fetch=True" in str(found["https://host/x.jpg?s=1"])
    first = next(iter(source(folder / "l.csv", text, fetch=True)))
    assert first.parts == (RemotePicture(name="https://host/x.jpg?s=1"),) and first.tags == ""
    with pytest.raises(InputError, match="by addresses") as caught:
        source(folder / "l.csv", "url\nhttps://host/x.jpg\ns3://bucket/y.png\n")
    assert [option.name for option in caught.value.options] == ["fetch"]


def test_a_list_that_changed_since_is_one_broken_item(folder: Path) -> None:
    listed = source(folder / "l.csv", "path\na.png\n")
    (folder / "l.csv").write_text("x,y\n1,2\n")
    assert list(errors(listed)) == ["lists/l.csv#rest"]
