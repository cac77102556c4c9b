from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from pixtral_runtime.errors import ImageError, InputError
from pixtral_runtime.inputs.image import IMAGE_FORMATS, decode_image
from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES, RESOURCE_FORK, collect_images, read_image_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp", "sub/deep/d.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_folder_gives_its_images_by_name(folder: Path) -> None:
    assert names(collect_images([str(folder)], [])) == ["a.JPG", "b.png"]


def test_recursive_looks_into_sub_folders(folder: Path) -> None:
    assert names(collect_images([str(folder)], [], recursive=True)) == ["a.JPG", "b.png", "c.webp", "d.heic"]


def test_a_named_file_is_taken_whatever_its_suffix(folder: Path) -> None:
    assert names(collect_images([str(folder / "notes.txt")], [])) == ["notes.txt"]


def test_globs_lists_and_repeats(folder: Path) -> None:
    stdin = [os.fsencode(folder / "b.png") + b"\n", b"\n", os.fsencode(folder / "sub" / "c.webp") + b"\r\n"]
    assert names(collect_images(["-", str(folder / "*.png")], stdin)) == ["b.png", "c.webp"]
    assert names(collect_images([str(folder / "**" / "*.heic")], [], recursive=True)) == ["d.heic"]


@pytest.mark.parametrize("source", ["nowhere", "*.nothing"])
def test_a_path_that_is_not_there_is_refused(folder: Path, source: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        collect_images([str(folder / source)], [])


@pytest.mark.parametrize("recursive", [False, True])
def test_an_empty_folder_is_refused(recursive: bool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in") as caught:
        collect_images([str(tmp_path)], [], recursive=recursive)
    assert ("recursive=" in caught.value.hint) != recursive  # what was asked for already is no help


def heard(folder: Path, *, recursive: bool = False) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    return names(collect_images([str(folder)], recursive=recursive, note=notes.append)), notes


def test_folders_give_all_that_can_be_read_and_nothing_else() -> None:
    Image.init()
    readable = {
        suffix for suffix, format in Image.registered_extensions().items() if format in (*IMAGE_FORMATS, "DIB", "MPO")
    }
    assert {".heic", ".heif"} == IMAGE_SUFFIXES - readable  # so that phones' pictures are not passed over in silence
    assert not readable - IMAGE_SUFFIXES


@pytest.mark.parametrize("format", ["ICO", "TGA", "MPO"])
def test_formats_of_icons_and_of_phones_are_read(tmp_path: Path, format: str) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    more = {"save_all": True, "append_images": [picture]} if format == "MPO" else {}
    picture.save(tmp_path / "a", format=format, **more)
    decoded = decode_image((tmp_path / "a").read_bytes(), "a")
    assert (decoded.format, decoded.pixels.size) == (format, (32, 32))
    assert decoded.pixels.getpixel((9, 9))[0] > 250  # type: ignore[index]


def test_names_are_bytes_in_folders_and_in_lists(tmp_path: Path) -> None:
    odd = [os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + b"/two\nlines.png"]
    for name in odd:
        Path(os.fsdecode(name)).touch()
    expected = [Path(os.fsdecode(name)) for name in odd]
    assert collect_images([str(tmp_path)]) == expected
    assert collect_images(["-"], [odd[0], b"\0", odd[1], b"\0"]) == expected  # find -print0
    assert collect_images(["-"], [b"\xef\xbb\xbf" + odd[0] + b"\r\n"]) == expected[:1]


def test_a_listed_path_that_is_not_there_is_kept_for_its_record(folder: Path) -> None:
    assert names(collect_images(["-"], [os.fsencode(folder / "gone.png") + b"\n"])) == ["gone.png"]
    with pytest.raises(ImageError, match="No such file"):
        read_image_file(folder / "gone.png")


def test_linked_folders_are_looked_into_once_and_circles_end(folder: Path) -> None:
    (folder / "z-link").symlink_to(folder / "sub")
    (folder / "circle").symlink_to(folder)
    (folder / "sub" / "deep" / "up").symlink_to(folder)
    found, _ = heard(folder, recursive=True)
    assert found == ["a.JPG", "b.png", "c.webp", "d.heic"]
    assert names(collect_images([str(folder / "z-link")], recursive=True)) == ["c.webp", "d.heic", "a.JPG", "b.png"]


def test_broken_links_are_kept_for_their_record(folder: Path) -> None:
    (folder / "broken.png").symlink_to("nowhere")
    assert heard(folder)[0] == ["a.JPG", "b.png", "broken.png"]


def test_what_is_passed_over_is_said(folder: Path) -> None:
    (folder / "._b.png").write_bytes(RESOURCE_FORK + bytes(20))
    (folder / "._c.png").write_bytes(b"a picture that is called so")
    os.mkfifo(folder / "pipe.png")
    found, notes = heard(folder)
    assert found == ["._c.png", "a.JPG", "b.png"]
    assert sorted(notes) == [
        "passed over: 1 files called *.txt, which is no image's suffix",
        "passed over: 1 pipes, sockets or devices with an image's suffix",
        "passed over: 1 resource forks of macOS (._*)",
    ]


def test_folders_that_cannot_be_listed_are_said_or_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def locked(path: Path) -> object:  # root may list everything
        if Path(path).name == "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert heard(folder, recursive=True)[0] == ["a.JPG", "b.png", "sub"]
    with pytest.raises(ImageError, match="sub: it is a folder"):
        read_image_file(folder / "sub")
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        collect_images([str(folder / "sub")])


@pytest.mark.parametrize("source", ["Describe the picture. " * 20, "x/" * 3000, "a.png" * 60])
def test_a_path_that_is_too_long_to_be_one_is_refused_in_a_line(source: str) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        collect_images([source])
    assert len(str(caught.value)) < 120
    assert ("prompt=" in caught.value.hint) == (" " in source)
    with pytest.raises(ImageError, match="too long"):
        read_image_file(Path(source))


def test_a_path_with_a_zero_byte_is_an_image_that_cannot_be_read() -> None:
    with pytest.raises(ImageError, match="null"):
        read_image_file(Path("a\0b.png"))
