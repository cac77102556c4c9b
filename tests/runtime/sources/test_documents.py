from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.pdf_files import pdf_file, text_page
from helpers.videos import write_video
from pixtral_runtime.errors import MissingPackageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import stored_size
from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES, images_and_folders
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.sources.documents import DocumentSettings, expand, suffixes
from pixtral_runtime.sources.video import VIDEO_SUFFIXES, VideoSettings

SETTINGS = DocumentSettings(
    fit=Preprocess(patch_size=16, max_side=128).drawn_size, wants_text=True, video=VideoSettings(frames=2)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.PDF").write_bytes(pdf_file([text_page("one"), text_page("two")]))
    pages = [Image.new("L", (40, 30), grey) for grey in (0, 255)]
    pages[0].save(tmp_path / "c.TIF", "TIFF", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "d.tiff")
    pages[0].save(tmp_path / "e.gif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "f.png")
    write_video(tmp_path / "a.avi", "MJPG", 10)
    return tmp_path


def test_files_are_what_their_suffix_says(folder: Path) -> None:
    found = {path.name: expand(path, SETTINGS) for path in sorted(folder.iterdir())}
    items = {name: list(items) for name, items in found.items() if items is not None}
    assert {name: [item.id.removeprefix(f"{folder}/") for item in made] for name, made in items.items()} == {
        "a.avi": ["a.avi"],
        "b.PDF": ["b.PDF#page=1", "b.PDF#page=2"],
        "c.TIF": ["c.TIF#page=1", "c.TIF#page=2"],
    }
    assert [item.text for item in items["b.PDF"]] == ["one", "two"]


def test_pictures_are_the_same_after_a_way_to_another_process(folder: Path) -> None:
    for name in ("a.avi", "b.PDF", "c.TIF"):
        made = expand(folder / name, SETTINGS)
        assert made is not None
        for item in made:
            there = pickle.loads(pickle.dumps(item))
            assert there.id == item.id
            pictures = zip(item.parts, there.parts, strict=True)
            for one, other in pictures:
                if isinstance(one, StoredPicture):
                    assert one.read() == other.read() and one.size() == other.size() == stored_size(one.read())


def test_a_folder_gives_documents_and_if_wanted_videos(folder: Path) -> None:
    def names(**options: bool) -> list[str]:
        return [path.name for path in images_and_folders([str(folder)], suffixes=suffixes(**options))]

    assert names() == ["b.PDF", "c.TIF", "d.tiff", "e.gif", "f.png"]
    assert names(with_videos=True) == ["a.avi", *names()]
    assert [path.name for path in images_and_folders([str(folder)])] == names()[1:]


def test_without_a_reader_a_folder_gives_no_pdf_and_a_named_one_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert suffixes() == IMAGE_SUFFIXES and suffixes(with_videos=True) == IMAGE_SUFFIXES | VIDEO_SUFFIXES
    with pytest.raises(MissingPackageError):
        expand(folder / "b.PDF", SETTINGS)


def test_nothing_is_written_to_the_disk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What Python opens while pages and frames are read it opens for reading; the libraries get no other place."""
    opened: list[tuple[str, object]] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            opened.append((str(arguments[0]), arguments[1] if arguments[1] is not None else arguments[2]))

    sys.addaudithook(hook)
    for name in ("a.avi", "b.PDF", "c.TIF"):
        for item in expand(folder / name, SETTINGS) or ():
            for part in item.parts:
                if isinstance(part, StoredPicture):
                    part.read()
    watching = False
    assert any(path.endswith("b.PDF") for path, _ in opened)
    assert not [(path, mode) for path, mode in opened if isinstance(mode, str) and set(mode) & set("wax+")]
