"""Decoding: the right picture or one clear error, for every kind of file that turns up in a folder of images."""

from __future__ import annotations

import csv
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.image import _convert_to_rgb
from PIL import Image, ImageOps

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.image import IMAGE_FORMATS, decode_image

LAB_TOLERANCE = 6  # of 255, seen 5: the colour is given in whole CIELAB steps
LAB_MEAN_TOLERANCE = 6  # of 255, seen 4.97: the twin picture is AVIF, compressed with loss
JPEG_TOLERANCE = 3  # of 255, seen 1: one flat colour

# pytest replaces the filters that the module installs; `test_nothing_leaks_...` checks those in a fresh process
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL\\."),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

MIN_IS_BLACK, WHITE_IS_ZERO, CIELAB = 1, 0, 8


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 17)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """An 8-bit grey PNG with the given chunks between the header and the end."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def tiff(width: int, photometric: int, bits: int, samples: int, pixels: bytes, broken: bool = False) -> bytes:
    """A little-endian, uncompressed TIFF of one row; `broken` adds a text tag that points behind the file's end."""
    tags = 10 if broken else 9
    bits_at = 8 + 2 + 12 * tags + 4
    entries = [(256, 3, 1, width), (257, 3, 1, 1), (258, 3, samples, bits if samples == 1 else bits_at)]
    entries += [(259, 3, 1, 1), (262, 3, 1, photometric)] + [(270, 2, 5000, 4000)] * broken
    entries += [(273, 4, 1, bits_at + 6), (277, 3, 1, samples), (278, 3, 1, 1), (279, 4, 1, len(pixels))]
    head = b"II*\0" + struct.pack("<IH", 8, tags) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + bytes(4) + struct.pack("<HHH", bits, bits, bits) + pixels


def grey16_tiff(values: list[int], photometric: int = MIN_IS_BLACK) -> bytes:
    return tiff(len(values), photometric, 16, 1, struct.pack(f"<{len(values)}H", *values))


def levels(data: bytes) -> list[int]:
    """The red values of a one-row picture."""
    return [int(value) for value in np.asarray(decode_image(data, "picture").pixels)[0, :, 0]]


def broken_stream_png() -> bytes:
    data = encode(noise(size=(200, 200)), "PNG")
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


SAME_AS_MISTRAL: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: encode(noise(), "PNG"),
    "rgb with a transparent colour": lambda: encode(Image.new("RGB", (5, 4), "red"), "PNG", transparency=(255, 0, 0)),
    "rgba": lambda: encode(noise("RGBA"), "PNG"),
    "rgba webp": lambda: encode(noise("RGBA"), "WEBP", lossless=True),
    "grey": lambda: encode(noise("L"), "PNG"),
    "grey with a transparent level": lambda: encode(Image.new("L", (5, 4), 7), "PNG", transparency=7),
    "grey and alpha": lambda: encode(noise("LA"), "PNG"),
    "1 bit": lambda: encode(noise("L").convert("1"), "PNG"),
    "1 bit fax": lambda: encode(noise("L").convert("1"), "TIFF", compression="group4"),
    "palette": lambda: encode(noise().quantize(16), "PNG"),
    "palette with one transparent entry": lambda: encode(noise().quantize(16), "PNG", transparency=3),
    "palette with alpha": lambda: encode(noise().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "cmyk tiff": lambda: encode(noise("CMYK"), "TIFF"),
    "cmyk jpeg": lambda: encode(noise("CMYK"), "JPEG"),
    "ycbcr": lambda: encode(noise("YCbCr"), "TIFF"),
    "lab": lambda: encode(noise("LAB"), "TIFF"),
    "bmp": lambda: encode(noise(), "BMP"),
    "ppm": lambda: encode(noise(), "PPM"),
    "jpeg 2000": lambda: encode(noise(size=(64, 64)), "JPEG2000"),
    "avif": lambda: encode(noise(), "AVIF"),
}


@pytest.mark.parametrize("kind", SAME_AS_MISTRAL)
def test_eight_bit_pictures_become_rgb_as_mistral_common_does_it(kind: str) -> None:
    data = SAME_AS_MISTRAL[kind]()
    decoded = decode_image(data, kind)
    assert decoded.pixels.mode == "RGB"
    assert np.array_equal(np.asarray(decoded.pixels), np.asarray(_convert_to_rgb(Image.open(io.BytesIO(data)))))


def test_transparent_pixels_become_white_and_half_transparent_ones_lighter() -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    assert levels(encode(picture, "PNG")) == [255, 127]


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "red.jpg").pixels
    assert np.abs(np.asarray(red, np.int16) - (255, 0, 0)).max() <= JPEG_TOLERANCE


def test_lab_pixels_have_the_colour_that_cielab_defines() -> None:
    red = struct.pack("<Bbb", round(54.29 * 2.55), 81, 70)  # sRGB red in CIELAB with white point D50
    pixels = decode_image(tiff(1, CIELAB, 8, 3, red), "red.tif").pixels
    assert np.abs(np.asarray(pixels, np.int16) - (255, 0, 0)).max() <= LAB_TOLERANCE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),  # 8-bit values in a 16-bit file
        ([0, 256, 600], [0, 64, 150]),  # 10 bits
        ([0, 1024, 4095], [0, 64, 255]),  # 12 bits
        ([0, 4096, 16383], [0, 64, 255]),  # 14 bits
        ([0, 32768, 65535], [0, 128, 255]),  # 16 bits
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_deep_grey_is_scaled_by_the_smallest_sensor_depth_that_holds_it(values: list[int], expected: list[int]) -> None:
    array = np.array([values], np.uint16)
    assert levels(grey16_tiff(values)) == expected
    assert levels(encode(Image.fromarray(array), "PNG")) == expected
    assert levels(encode(Image.fromarray(array.astype(">u2")), "TIFF")) == expected
    assert levels(encode(Image.fromarray(array.astype(np.int32)), "TIFF")) == expected


def test_big_endian_and_32_bit_grey_are_really_read_in_their_own_modes() -> None:
    values = np.array([[1, 2, 3]])
    for dtype, mode in ((">u2", "I;16B"), ("<u2", "I;16"), (np.int32, "I")):
        assert Image.open(io.BytesIO(encode(Image.fromarray(values.astype(dtype)), "TIFF"))).mode == mode


def test_deep_grey_with_white_stored_as_zero_is_not_a_negative() -> None:
    assert levels(grey16_tiff([0, 4095], WHITE_IS_ZERO)) == [255, 0]


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_grey_values_that_no_sensor_depth_holds_are_refused(values: list[int]) -> None:
    data = encode(Image.fromarray(np.array([values], np.int32)), "TIFF")
    with pytest.raises(ImageError, match=f"scan.tif: grey values from {values[0]} to {values[1]}"):
        decode_image(data, "scan.tif")


def test_floating_point_pixels_are_refused_with_the_command_that_converts_them() -> None:
    data = encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF")
    with pytest.raises(ImageError, match=r"depth map\.tif: floating-point") as caught:
        decode_image(data, "depth map.tif")
    assert "magick 'depth map.tif'" in caught.value.hint


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_unless_switched_off(orientation: int) -> None:
    data = encode(noise(), "PNG", exif=exif_with(orientation))
    upright = decode_image(data, "photo")
    assert upright.exif_orientation == orientation
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(upright.pixels), np.asarray(expected))
    stored = decode_image(data, "photo", apply_exif=False)
    assert stored.exif_orientation == orientation
    assert np.array_equal(np.asarray(stored.pixels), np.asarray(noise()))


def test_tiff_is_upright_whatever_is_asked_for() -> None:
    data = encode(noise(), "TIFF", exif=exif_with(6))
    for apply_exif in (True, False):
        decoded = decode_image(data, "scan.tif", apply_exif=apply_exif)
        assert (decoded.pixels.size, decoded.exif_orientation) == ((17, 24), 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif_with(99).tobytes()])
def test_broken_exif_counts_as_absent(exif: bytes) -> None:
    decoded = decode_image(encode(noise(), "JPEG", exif=exif), "photo.jpg")
    assert (decoded.pixels.size, decoded.exif_orientation) == ((24, 17), 1)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_used(format: str) -> None:
    red, *others = (Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(red, format, save_all=True, append_images=others, **options), "clip")
    assert (decoded.format, decoded.frames) == (format, 3)
    assert decoded.pixels.getcolors() == [(48, (255, 0, 0))]


def test_animation_damaged_behind_its_first_frame_still_gives_that_frame() -> None:
    frames = [noise("L"), *(Image.new("L", (24, 17), level) for level in (0, 99))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = decode_image(data[:-10], "clip.gif")
    assert np.array_equal(np.asarray(decoded.pixels)[:, :, 0], np.asarray(noise("L")))


def test_content_decides_the_format_not_the_name() -> None:
    decoded = decode_image(encode(noise(), "PNG"), "holiday.jpg")
    assert (decoded.format, decoded.frames, decoded.exif_orientation) == ("PNG", 1, 1)


def test_pixels_are_detached_from_the_file() -> None:
    assert type(decode_image(encode(noise(), "PNG"), "photo").pixels) is Image.Image


def test_picture_of_four_by_four_pixels_is_fine() -> None:
    assert decode_image(encode(noise(size=(4, 4)), "GIF"), "dot.gif").pixels.size == (4, 4)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"no picture at all", "unsupported format; supported are JPEG, PNG"),
    "web page": (lambda: b"\n<!doctype html><html>", r"unsupported format \(SVG or HTML text\)"),
    "pdf": (lambda: b"%PDF-1.7\n", r"unsupported format \(PDF\)"),
    "heic": (lambda: HEIC, r"unsupported format \(HEIC\)"),
    "heic by brand": (lambda: HEIC.replace(b"ftypheic", b"ftypmif1"), r"unsupported format \(HEIC\)"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported format"),
    "truncated jpeg": (lambda: encode(noise(), "JPEG")[:-40], "damaged or incomplete JPEG: .*truncated"),
    "truncated webp": (lambda: encode(noise(), "WEBP")[:-40], "damaged or incomplete WEBP"),
    "truncated gif": (lambda: encode(noise("L"), "GIF")[:-40], "damaged or incomplete GIF"),
    "truncated tiff": (lambda: grey16_tiff([1, 2, 3])[:-3], "damaged or incomplete TIFF"),
    "header only": (lambda: encode(noise(), "PNG")[:20], "damaged or incomplete PNG: Truncated File Read"),
    "signature only": (lambda: b"\xff\xd8\xff", "damaged or incomplete JPEG: its header cannot be read"),
    "broken stream": (broken_stream_png, "damaged or incomplete PNG"),
    "text bomb": (
        lambda: png(1, 1, png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2 << 20)))),
        "damaged or incomplete PNG: Decompressed data too large",
    ),
    "canvas bomb": (lambda: png(60_000, 60_000), "too large to decode safely"),
    "large canvas": (lambda: png(12_000, 9_000), "too large to decode safely: 12000 x 9000 = 108,000,000 pixels"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_gives_one_error_with_its_name_the_reason_and_a_hint(kind: str) -> None:
    make, reason = BAD_FILES[kind]
    data = make()
    for _ in range(2):  # partial pixels must not appear on a second try either
        with pytest.raises(ImageError, match=f"^my file.png: {reason}") as caught:
            decode_image(data, "my file.png")
        assert caught.value.hint


def test_unsupported_format_says_what_works_and_how_to_convert() -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(HEIC, "my photo.heic")
    assert all(name in str(caught.value) for name in IMAGE_FORMATS)
    assert "magick 'my photo.heic' converted.png" in caught.value.hint


def test_pixel_limit_counts_width_times_height_and_is_checked_before_decoding() -> None:
    data = encode(noise(size=(100, 100)), "PNG")
    assert decode_image(data, "square.png", max_pixels=10_000).pixels.size == (100, 100)
    with pytest.raises(ImageError, match="100 x 100 = 10,000 pixels, the limit is 9,999"):
        decode_image(data[: len(data) // 2], "square.png", max_pixels=9_999)


def test_no_damage_in_any_place_leads_to_anything_but_an_image_error() -> None:
    random = np.random.default_rng(1)
    unchanged = 0
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        whole = encode(noise(size=(40, 40)), format)
        for _ in range(40):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(0, 256)
            try:
                unchanged += decode_image(bytes(data), "fuzz", max_pixels=1_000_000).pixels.mode == "RGB"
            except ImageError as error:
                assert error.hint
    assert unchanged > 0


def broken_tag_tiff() -> bytes:
    return tiff(2, MIN_IS_BLACK, 16, 1, struct.pack("<2H", 0, 255), broken=True)


def test_pillow_does_warn_about_the_files_of_the_next_test() -> None:
    for data in (broken_tag_tiff(), png(12_000, 9_000)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Image.open(io.BytesIO(data))
        assert caught


@pytest.mark.parametrize("flags", [[], ["-W", "error"], ["-W", "always"]])
def test_nothing_leaks_to_the_terminal_and_pillow_keeps_its_settings(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "tag.tif").write_bytes(broken_tag_tiff())
    (tmp_path / "large.png").write_bytes(png(12_000, 9_000))
    (tmp_path / "short.tif").write_bytes(grey16_tiff([1, 2, 3])[:-3])
    (tmp_path / "exif.jpg").write_bytes(encode(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))
    script = """
import pathlib, sys
from PIL import Image, ImageFile
before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
from pixtral_runtime.inputs.image import ImageError, decode_image
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, decode_image(path.read_bytes(), path.name, max_pixels=150_000_000).pixels.size)
    except ImageError:
        print(path.name, "refused")
assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
"""
    command = [sys.executable, *flags, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["exif.jpg (24, 17)", "large.png refused", "short.tif refused", "tag.tif (2, 1)"]


def test_eight_threads_get_what_one_gets() -> None:
    files = [make() for make in SAME_AS_MISTRAL.values()] + [make() for make, _ in BAD_FILES.values()]
    files += [broken_tag_tiff(), grey16_tiff([1, 700])]

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode_image(data, "picture").pixels.tobytes()
        except ImageError as error:
            return str(error)

    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files * 10)) == alone * 10


def test_every_real_picture_decodes_to_its_size_or_is_refused(shared_images: Path) -> None:
    with (shared_images / "manifest.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    good = 0
    for row in rows:
        data = (shared_images / row["file"]).read_bytes()
        if row["pillow_result"] != "ok" or row["file"].startswith("bad_"):
            with pytest.raises(ImageError, match=f"^{row['file']}: "):
                decode_image(data, row["file"])
            continue
        decoded = decode_image(data, row["file"])
        stored = (int(row["width"]), int(row["height"]))
        assert decoded.pixels.size == (stored[::-1] if row["exif_orientation"] == "6" else stored), row["file"]
        assert (decoded.format, decoded.frames) == (row["format"], int(row["frames"])), row["file"]
        assert np.asarray(decoded.pixels).std() > 1, f"{row['file']} came out as a blank page"
        good += 1
    assert (good, len(rows) - good) == (30, 6)


def test_real_lab_scan_has_the_colours_of_the_same_portrait_in_avif(shared_images: Path) -> None:
    lab, avif = (
        np.asarray(decode_image((shared_images / name).read_bytes(), name).pixels, np.float32)
        for name in ("nasty_lab.tif", "nasty_portrait.avif")
    )
    assert np.abs(lab - avif).mean() < LAB_MEAN_TOLERANCE


def test_real_cmyk_picture_shows_red_on_black(shared_images: Path) -> None:
    pixels = np.asarray(decode_image((shared_images / "nasty_cmyk.jpg").read_bytes(), "nasty_cmyk.jpg").pixels)
    assert pixels[:, :, 0].max() > 200 > 50 > pixels[:, :, 1:].max()
