from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pages import PageSettings, parse_pages
from pixtral_runtime.sources.tiff import NEW_SUBFILE_TYPE, SMALLER_COPY, tiff_items

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL\\.")  # pytest puts back what the image module silences

SETTINGS = PageSettings(fit=lambda width, height: (16, 16))
IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE = 256, 257, 258
COLOURS = ("red", "lime", "blue")


def page(colour: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (40, 30), colour).convert(mode)


def written(path: Path, pages: list[Image.Image], **options: object) -> Path:
    pages[0].save(path, "TIFF", save_all=True, append_images=pages[1:], **options)
    return path


def pixels(part: object) -> NDArray[np.uint8]:
    assert isinstance(part, StoredPicture)
    return np.asarray(decode_image(part.read(), part.name).pixels)


def items(path: Path, settings: PageSettings = SETTINGS) -> list[Item]:
    found = tiff_items(path, settings)
    assert found is not None
    return list(found)


def places(data: bytes | bytearray) -> list[int]:
    """Where the directory of each page begins."""
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        image.seek(image.n_frames - 1)
        return list(image._frame_pos)


def place_of(data: bytes | bytearray, number: int, tag: int) -> int:
    """Where a page's entry for a tag begins."""
    start = places(data)[number]
    (count,) = struct.unpack_from("<H", data, start)
    entries = range(start + 2, start + 2 + 12 * count, 12)
    return next(place for place in entries if struct.unpack_from("<H", data, place)[0] == tag)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_a_page_is_an_item_with_its_own_pixels(compression: str, tmp_path: Path) -> None:
    path = written(tmp_path / "fax.tif", [page(colour) for colour in COLOURS], compression=compression)
    found = items(path)
    assert [item.id for item in found] == [f"{path}#page={number}" for number in (1, 2, 3)]
    for item, colour in zip(found, COLOURS, strict=True):
        assert item.name == "fax" and item.directory == tmp_path.name
        assert (pixels(item.parts[0]) == np.asarray(page(colour))).all()


def test_a_document_is_one_item_and_pages_are_chosen(tmp_path: Path) -> None:
    path = written(tmp_path / "fax.tiff", [page(colour) for colour in COLOURS])
    settings = PageSettings(fit=SETTINGS.fit, per_document=True, pages=parse_pages("3,1"))
    (item,) = items(path, settings)
    assert item.id == str(path)
    assert [tuple(pixels(part)[0, 0]) for part in item.parts] == [(0, 0, 255), (255, 0, 0)]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGBA", "I;16", "P"])
def test_a_page_follows_the_rules_of_a_picture(mode: str, tmp_path: Path) -> None:
    ramp = Image.fromarray(np.linspace(0, 1023, 1200).reshape(30, 40).astype(np.uint16))
    odd = ramp if mode == "I;16" else Image.fromarray((np.asarray(ramp) // 4).astype(np.uint8)).convert(mode)
    alone = io.BytesIO()
    odd.save(alone, "TIFF")
    (_, item) = items(written(tmp_path / "a.tif", [page(), odd]))
    assert (pixels(item.parts[0]) == np.asarray(decode_image(alone.getvalue(), "").pixels)).all()


def test_a_turned_page_is_upright(tmp_path: Path) -> None:
    pages = [page(), page()]
    pages[1].putpixel((0, 0), (0, 0, 0))
    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(path) as file:
        for picture, orientation in zip(pages, (1, 6), strict=True):
            picture.save(file, "TIFF", tiffinfo={274: orientation})
            file.newFrame()
    found = pixels(items(path)[1].parts[0])
    assert found.shape == (40, 30, 3) and tuple(found[0, -1]) == (0, 0, 0)


def test_smaller_copies_between_pages_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(path) as file:
        for colour, kind in (("red", 0), ("lime", SMALLER_COPY), ("blue", 0)):
            page(colour).save(file, "TIFF", tiffinfo={NEW_SUBFILE_TYPE: kind})
            file.newFrame()
    assert [tuple(pixels(item.parts[0])[0, 0]) for item in items(path)] == [(255, 0, 0), (0, 0, 255)]


def test_a_picture_with_its_thumbnail_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(path) as file:
        for kind in (0, SMALLER_COPY):
            page().save(file, "TIFF", tiffinfo={NEW_SUBFILE_TYPE: kind})
            file.newFrame()
    assert tiff_items(path, SETTINGS) is None


@pytest.mark.parametrize("data", [b"", b"II*\0", b"GIF89a", None])
def test_what_is_no_document_is_left_to_those_who_read_pictures(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "a.tif").write_bytes(data)
    assert tiff_items(tmp_path / "a.tif", SETTINGS) is None
    assert tiff_items(written(tmp_path / "one.tif", [page()]), SETTINGS) is None


def test_a_first_page_of_impossible_size_is_left_to_those_who_read_pictures(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", [page(), page()])
    data = bytearray(path.read_bytes())
    for tag in (IMAGE_WIDTH, IMAGE_LENGTH):
        struct.pack_into("<HII", data, place_of(data, 0, tag) + 2, 4, 1, 100_000)
    path.write_bytes(data)
    assert tiff_items(path, SETTINGS) is None
    with pytest.raises(ImageError, match="too large to decode safely"):
        decode_image(path.read_bytes(), "a.tif")


def test_a_damaged_page_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", [page(colour) for colour in COLOURS])
    data = bytearray(path.read_bytes())
    struct.pack_into("<HII", data, place_of(data, 1, BITS_PER_SAMPLE) + 2, 3, 1, 99)  # 99 bits
    path.write_bytes(data)
    first, second, third = items(path)
    assert tuple(pixels(first.parts[0])[0, 0]) == (255, 0, 0) and tuple(pixels(third.parts[0])[0, 0]) == (0, 0, 255)
    with pytest.raises(ImageError, match=r"a\.tif#page=2: damaged or incomplete TIFF"):
        pixels(second.parts[0])


def test_a_file_that_was_cut_off_has_the_pages_before(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", [page(colour) for colour in COLOURS])
    path.write_bytes(path.read_bytes()[: places(path.read_bytes())[2] + 1])
    *whole, broken = items(path)
    assert [tuple(pixels(item.parts[0])[0, 0]) for item in whole] == [(255, 0, 0), (0, 255, 0)]
    with pytest.raises(ImageError, match="#page=3: damaged or incomplete TIFF"):
        pixels(broken.parts[0])


@pytest.mark.parametrize("to", [0, 1, 2])
def test_pages_that_lead_in_a_circle_end(to: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", [page(colour) for colour in COLOURS])
    data = bytearray(path.read_bytes())
    start = places(data)
    (count,) = struct.unpack_from("<H", data, start[-1])
    struct.pack_into("<I", data, start[-1] + 2 + 12 * count, start[to])
    path.write_bytes(data)
    assert len(items(path)) == 3


def test_a_page_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    huge = Image.new("1", (10_000, 9_500))
    _, item = items(written(tmp_path / "a.tif", [page(), huge], compression="tiff_deflate"))
    with pytest.raises(ImageError, match="#page=2: too large to decode safely"):
        pixels(item.parts[0])
