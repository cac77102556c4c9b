"""Zip archives of the usual programs, and of people who mean harm."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from helpers.sources import contents, errors, picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources import zip_archive
from pixtral_runtime.sources.data_file import LocalFile
from pixtral_runtime.sources.zip_archive import ZipSource


def write(path: Path, *named: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in named:
            archive.writestr(name, data)
    return path


def source(path: Path) -> ZipSource:
    return ZipSource(LocalFile(str(path)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_pictures_come_in_the_archives_order_with_their_texts(tmp_path: Path, method: int) -> None:
    path = write(
        tmp_path / "x.zip", ("b.PNG", picture(2)), ("sub/ä.png", picture(3)), ("b.txt", b" tags of b \n"),
        ("a.png", picture(1)), ("a.png", picture(4)), ("sub/", b""), ("notes.md", b"x"), ("._b.png", b"fork"),
        ("__MACOSX/sub/ä.png", b"fork"), ("../../up.png", picture(5)), method=method,
    )  # fmt: skip
    archive = source(path)
    items = list(archive)
    found = {id.removeprefix(f"{path}/"): data for id, (data,) in contents(items).items()}
    assert found == {
        "b.PNG": picture(2), "sub/ä.png": picture(3), "a.png": picture(1), "a.png (2)": picture(4),
        "../../up.png": picture(5),
    }  # fmt: skip
    assert [(item.name, item.directory, item.tags) for item in items[:2]] == [("b", "x", "tags of b"), ("ä", "sub", "")]
    assert archive.total == 5 and archive.files == (path,)
    assert [item.id for item in archive] == [item.id for item in items]
    assert [file.name for file in tmp_path.iterdir()] == ["x.zip"]


def test_what_the_program_zip_wrote(tmp_path: Path) -> None:
    if shutil.which("zip") is None:
        pytest.skip("there is no program zip")
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    subprocess.run(["zip", "-q", "x.zip", "0.png", "1.png", "2.png"], cwd=tmp_path, check=True)
    subprocess.run(["zip", "-q", "-P", "secret", "locked.zip", "0.png", "1.png"], cwd=tmp_path, check=True)
    assert list(contents(source(tmp_path / "x.zip")).values()) == [[picture(n)] for n in range(3)]
    locked = errors(source(tmp_path / "locked.zip"))
    assert [text.partition(": ")[2] for text in locked.values()] == [
        "it is encrypted | unpack the archive with its password, and name the folder"
    ] * 2


def test_a_wrong_check_sum_is_one_broken_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", ("a.png", b"A" * 50), ("b.png", b"B" * 50), method=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"A" * 50, b"A" * 49 + b"x"))
    assert contents(source(path)) == {
        f"{path}/a.png": [
            f"{path}/a.png: damaged in its archive: Bad CRC-32 for file 'a.png' | copy or download it again"
        ],
        f"{path}/b.png": [b"B" * 50],
    }


def test_bombs_are_refused_by_what_they_say_and_by_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_archive, "LARGEST_FILE_BYTES", 10_000)
    path = write(tmp_path / "x.zip", ("honest.png", bytes(20_000)), ("liar.png", bytes(50_000)), ("a.png", picture(1)))
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.header_offset for info in archive.infolist()}
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\1\2", 0, data.rindex(b"liar.png"))
    for at in (sizes["liar.png"] + 22, central + 24):
        data[at : at + 4] = (100).to_bytes(4, "little")  # bytes that it claims to have
    path.write_bytes(data)
    found = contents(source(path))
    assert "20,000 bytes, expected 10,000 at most" in str(found[f"{path}/honest.png"])
    assert "Bad CRC-32" in str(found[f"{path}/liar.png"])
    assert found[f"{path}/a.png"] == [picture(1)]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "no whole zip archive"), (b"no archive" * 99, "no whole zip archive"), (None, "holds no pictures, but 1")],
)
def test_what_is_no_archive_of_pictures_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = write(tmp_path / "x.zip", ("a.txt", b"text"))
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        source(path)


def test_an_archive_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", ("a.png", picture(1)), ("b.png", picture(2)))
    whole = path.read_bytes()
    for keep in (len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match="no whole zip archive"):
            source(path)


def test_an_archive_that_changed_since_is_one_broken_item(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", ("a.png", picture(1)))
    opened = source(path)
    path.write_bytes(b"something else")
    assert list(errors(opened)) == [f"{path}#rest"]


def test_the_file_is_closed_when_nobody_goes_on(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "x.zip", ("a.png", picture(1)), ("b.png", picture(1))))
    before = len(os.listdir("/proc/self/fd"))
    items = iter(opened)
    next(items)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    items.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before
