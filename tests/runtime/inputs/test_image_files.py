from __future__ import annotations

from pathlib import Path

import pytest

from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.image_files import collect_images


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
    stdin = [f"{folder / 'b.png'}\n", "\n", f"{folder / 'sub' / 'c.webp'}\n"]
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
