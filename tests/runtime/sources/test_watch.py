"""A watched folder gives each picture once it is whole, again when it changes, and outlives the folder itself."""

from __future__ import annotations

import os
import shutil
import time
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from helpers.pdf_files import pdf_file, text_page
from helpers.videos import write_video
from helpers.watching import SHORT, watching, write_picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources import watched_folder
from pixtral_runtime.sources.documents import watched_suffixes
from pixtral_runtime.sources.endings import has_end
from pixtral_runtime.sources.watch import Watch

OTHER_DISK = Path("/dev/shm")


@pytest.fixture
def cam(tmp_path: Path) -> Path:
    (tmp_path / "cam").mkdir()
    return tmp_path / "cam"


def test_what_is_there_comes_by_name_and_what_comes_later_in_the_order_in_which_it_was_written(cam: Path) -> None:
    for age, name in enumerate(("c.png", "a.jpg", "b.png")):
        write_picture(cam / name)
        os.utime(cam / name, (age, age))
    with watching(cam) as found:
        assert found.next(3) == ["a.jpg", "b.png", "c.png"]
        assert found.said() == f"waiting for pictures in {cam}"
        write_picture(cam / "y.png")
        assert found.next() == ["y.png"]
        write_picture(cam / "x.png")
        assert found.next() == ["x.png"]
        assert found.notes.empty()


def test_pictures_that_are_found_together_come_by_their_time(cam: Path) -> None:
    write_picture(cam / "first.png")
    pictures = iter(Watch([cam], **SHORT))
    assert Path(next(pictures).id).name == "first.png"
    for age, name in enumerate(("z.png", "x.png", "y.png")):
        os.utime(write_picture(cam / name), (age, age))
    assert [Path(next(pictures).id).name for _ in range(3)] == ["z.png", "x.png", "y.png"]


@pytest.mark.parametrize("name", ["slow.jpg", "slow.png"])
def test_a_picture_that_is_written_in_parts_with_pauses_comes_once_and_whole(cam: Path, name: str) -> None:
    data = write_picture(cam / name).read_bytes()
    (cam / name).unlink()
    sizes = []
    with watching(cam, patience_s=60.0) as found:
        with (cam / name).open("wb", buffering=0) as file:
            for part in (data[:100], data[100:-2], data[-2:]):
                sizes.append((cam / name).stat().st_size)
                file.write(part)
                time.sleep(4 * SHORT["settle_s"])
                if part != data[-2:]:
                    found.nothing_before(cam / f"{len(sizes)}.png")
        assert found.next() == [name]
        assert (cam / name).read_bytes() == data
        found.nothing_before(cam / "last.png")


def test_a_picture_without_an_end_comes_after_a_while_and_again_once_it_has_one_and_an_empty_one_not(cam: Path) -> None:
    data = write_picture(cam / "cut.jpg").read_bytes()
    (cam / "cut.jpg").write_bytes(data[:-10])
    (cam / "empty.jpg").touch()
    with watching(cam) as found:
        assert found.next() == ["cut.jpg"]
        (cam / "cut.jpg").write_bytes(data)
        assert found.next() == ["cut.jpg"]
        found.nothing_before(cam / "marker.png")
        (cam / "empty.jpg").write_bytes(data)
        assert found.next() == ["empty.jpg"]


def test_temporary_and_hidden_names_do_not_count_until_they_are_renamed(cam: Path) -> None:
    whole = write_picture(cam / "whole.png").read_bytes()
    hidden = (".a.png", "b.png.part", "c.tmp.png", "d.png.crdownload", "~e.png", "f~.png", "notes.txt", "._g.png")
    for name in hidden:
        (cam / name).write_bytes(whole)
    (cam / "folder.png").mkdir()
    (cam / "nowhere.png").symlink_to(cam / "absent.png")
    with watching(cam, recursive=True) as found:
        assert found.next() == ["whole.png"]
        found.nothing_before(cam / "marker.png")
        (cam / "b.png.part").rename(cam / "b.png")
        assert found.next() == ["b.png"]
        write_picture(cam / "absent.png")
        assert sorted(found.next(2)) == ["absent.png", "nowhere.png"]
        write_picture(cam / "folder.png" / "deep.png")
        assert found.next() == ["deep.png"]


def test_a_picture_that_is_replaced_or_comes_back_comes_again(cam: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_folder, "RECHECKED", 3)  # so that not all are compared at each look
    for number in range(10):
        write_picture(cam / f"{number}.png")
    with watching(cam) as found:
        found.next(10)
        write_picture(cam / "7.png", "blue")
        os.utime(cam / "7.png", (1, 1))
        assert found.next() == ["7.png"]
        (cam / "3.png").unlink()
        found.nothing_before(cam / "marker.png")
        write_picture(cam / "3.png")
        assert found.next() == ["3.png"]
        (cam / "4.png").rename(cam / "four.png")
        assert found.next() == ["four.png"]
        found.watch.forget(cam / "5.png")
        assert found.next() == ["5.png"]


def test_a_folder_that_vanishes_is_waited_for_and_nothing_comes_twice(cam: Path) -> None:
    (cam / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        write_picture(cam / name)
    with watching(cam, recursive=True) as found:
        assert found.next(2) == ["a.png", "b.png"]
        assert "waiting" in found.said()
        cam.rename(cam.with_name("away"))
        assert found.said() == f"{cam} cannot be read: No such file or directory; it is waited for"
        write_picture(cam.with_name("away") / "sub" / "c.png")
        cam.with_name("away").rename(cam)
        assert found.said() == f"{cam} is back"
        assert found.next() == ["c.png"]
        shutil.rmtree(cam / "sub")
        found.nothing_before(cam / "marker.png")
        assert found.notes.empty()


@pytest.mark.skipif(
    not OTHER_DISK.is_dir() or OTHER_DISK.stat().st_dev == Path("/tmp").stat().st_dev, reason="needs a second disk"
)
def test_an_empty_folder_on_another_disk_is_one_where_a_disk_was_mounted(cam: Path, tmp_path: Path) -> None:
    write_picture(cam / "a.png")
    link, empty = tmp_path / "link", OTHER_DISK / f"pixtral-{os.getpid()}"
    link.symlink_to(cam)
    empty.mkdir()
    try:
        with watching(link) as found:
            assert found.next() == ["a.png"]
            assert "waiting" in found.said()
            swap(link, empty)
            assert "it is waited for" in found.said()
            swap(link, cam)
            assert found.said() == f"{link} is back"
            found.nothing_before(cam / "b.png")
    finally:
        empty.rmdir()


def swap(link: Path, target: Path) -> None:
    link.with_name("new").symlink_to(target)
    link.with_name("new").replace(link)


def test_each_folder_is_looked_into_once_whatever_leads_there(cam: Path, tmp_path: Path) -> None:
    (cam / "sub").mkdir()
    (cam / ".hidden").mkdir()
    (cam / "again").symlink_to(cam)
    (cam / "a-link").symlink_to(cam / "sub")
    write_picture(cam / "sub" / "a.png")
    write_picture(cam / ".hidden" / "no.png")
    with watching(cam, cam / "sub", cam, recursive=True) as found:
        assert found.next() == ["a.png"]
        (cam / "later").mkdir()
        write_picture(cam / "later" / "b.png")
        assert found.next() == ["b.png"]
        found.nothing_before(cam / "c.png")
        assert found.watch.root_of(cam / "sub" / "a.png") == cam
        assert found.watch.root_of(tmp_path / "a.png") is None


def test_other_files_come_where_they_are_wanted(cam: Path) -> None:
    for name in ("a.PDF", "b.png", "c.mp4", "d.txt"):
        write_picture(cam / name)
    found = islice(Watch([cam], watched_suffixes(with_videos=True), **SHORT), 3)
    assert [Path(item.id).name for item in found] == ["a.PDF", "b.png", "c.mp4"]


def test_only_folders_can_be_watched(cam: Path) -> None:
    for name in (write_picture(cam / "a.png"), cam / "*", Path("-"), Path("a\0b")):
        with pytest.raises(InputError, match="cannot be watched"):
            Watch([cam, name])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_end_of_a_file_is_seen(tmp_path: Path, format: str) -> None:
    path = tmp_path / "picture"
    options = {"compression": "tiff_lzw"} if format == "TIFF" else {}
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format, **options)
    whole = path.read_bytes()
    assert has_end(path)
    for cut in (0, 1, 8, 100, len(whole) // 2, *([] if format == "TIFF" else [len(whole) - 20])):
        path.write_bytes(whole[:cut])
        assert not has_end(path), cut
        if format in ("JPEG", "PNG", "GIF") and cut != 1:  # a place that was taken before it was written
            path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
            assert not has_end(path), cut
    path.write_bytes(whole + bytes(100))
    assert has_end(path)
    path.unlink()
    assert not has_end(path)


def test_the_end_of_a_pdf_is_seen_behind_and_before_what_does_not_belong_to_it(tmp_path: Path) -> None:
    path, whole = tmp_path / "scan.pdf", pdf_file([text_page("one")])
    for data in (
        whole,
        whole + bytes(100),
        whole.rstrip(),
        b"junk\n" * 9 + whole,
        whole + b"\r\n</html>",
        whole + whole,
    ):
        path.write_bytes(data)
        assert has_end(path)
    for cut in (0, 10, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        assert not has_end(path), cut
    first_end = b"startxref\n0\n%%EOF\n"  # where a linearized file goes on behind it
    path.write_bytes(whole[:100] + first_end)
    assert not has_end(path)
    path.write_bytes(whole[:100] + first_end + whole[100:])
    assert has_end(path)


def test_a_tiff_that_lacks_pages_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "fax.tif"
    pages = [Image.effect_noise((64, 64), 50) for _ in range(3)]
    for byte_order in "IM":
        options = {} if byte_order == "I" else {"big_endian": True}
        pages[0].save(path, "TIFF", save_all=True, append_images=pages[1:], **options)
        whole = path.read_bytes()
        assert has_end(path)
        for share in (0.3, 0.5, 0.65):
            path.write_bytes(whole[: int(share * len(whole))])
            assert not has_end(path), share


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mp4v"), ("mov", "mp4v"), ("mkv", "mp4v"), ("webm", "VP80"), ("avi", "MJPG")]
)
def test_the_end_of_a_video_is_seen(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", codec, 10)
    whole = path.read_bytes()
    assert has_end(path)
    for cut in (0, 8, 40, 400, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert not has_end(path), cut


def test_a_video_whose_format_has_no_end_is_waited_for(tmp_path: Path) -> None:
    assert not has_end(write_video(tmp_path / "clip.mpg", "MPG1", 10))
