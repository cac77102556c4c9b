"""From the bytes of a file to an upright RGB picture, or to one clear error.

In: the bytes and a name for messages. Out: a `DecodedImage`. The content decides the format, never the file's name.

Rules, and why:

- Colour follows mistral_common (specification section 2.1): RGB stays, everything else is laid on opaque white.
- 16-bit grey has no agreed white point. Pillow clips it at 255, which turns most sensor pictures all white; dividing by
  256 turns a 10-bit picture nearly black. So white becomes the top of the smallest usual sensor depth (8, 10, 12, 14 or
  16 bits) that holds the brightest pixel.
- EXIF orientation is applied by default, because users judge what they see; mistral_common itself ignores it. Pillow
  turns TIFFs upright on its own, so these are always upright and report orientation 1.
- Only `IMAGE_FORMATS` are tried. Pillow's other readers are rare, and some start programs (EPS runs Ghostscript).
- A picture larger than `max_pixels`, or than the memory that is left can take, is refused by its header, before any
  pixel is decoded: a file of some kilobytes may say that it has millions. Pillow has a limit of its own, twice
  `Image.MAX_IMAGE_PIXELS`; raising `max_pixels` beyond it changes nothing.

`decode_image` may run in many threads at once and changes no setting of Pillow. Importing this module silences two
kinds of warnings raised inside Pillow: doubtful metadata, and pictures that are large but within the limit. It is done
once, here, because `warnings.catch_warnings` around each decode is not safe with threads.

What cannot be silenced: libtiff, in C, prints a line of its own to stderr about some damaged compressed TIFFs.
"""

from __future__ import annotations

import io
import shlex
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import ImageError, ImageMemoryError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
MAX_PIXELS = 89_478_485  # 256 MiB of RGB bytes, Pillow's own mark for doubt; resizing such a picture peaks near 2.1 GB
BYTES_PER_PIXEL = 30  # while a picture is decoded and scaled; seen from 21 (grey) to 29 (with transparency)
NOTICED_BYTES = 1 << 27  # up to here memory is not asked about
SHARE_OF_MEMORY = 0.9  # of what is left; the rest is for everybody else
SMALLER = "a smaller copy of the picture"
GREY_DEPTHS_BITS = (8, 10, 12, 14, 16)  # bits of usual sensors and scanners

_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Damaged files make Pillow's readers fail in many ways, some by plain accident; all mean "this file is damaged".
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, module=r"PIL\.")


@dataclass(frozen=True)
class DecodedImage:
    """A picture ready for `Preprocess`, and what was found out about its file."""

    pixels: Image.Image  # mode RGB, loaded, orientation applied
    format: str  # Pillow's name for the content, such as "JPEG"
    frames: int  # the first one is used; 1 also where damage behind the first hinders counting
    exif_orientation: int  # as stored, 1 when absent or unreadable


def decode_image(
    data: bytes, name: str, *, apply_exif: bool = True, max_pixels: int = MAX_PIXELS, enough_px: int | None = None
) -> DecodedImage:
    """Decode one file. Raises ImageError, naming `name`, unless the bytes are a whole picture of a known format.

    Where sides of `enough_px` pixels do, a larger JPEG comes out at a half, quarter or eighth of its size, several
    times sooner; that is good for thumbnails only.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty", "copy or download it again")
    with _clear_errors(data, name):
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        rgb = _loaded(image, name, max_pixels, enough_px)
    orientation = _orientation(image)
    if apply_exif and orientation in _TO_UPRIGHT:
        rgb = rgb.transpose(_TO_UPRIGHT[orientation])
    return DecodedImage(rgb, image.format or "", _count_frames(image), orientation)


def decode_frame(file: BinaryIO, frame: int, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One of the pictures in a TIFF file, upright RGB, counted from 0 as they are stored. Raises ImageError."""
    start = file.read(16)
    with _clear_errors(start, name):
        image = Image.open(file, formats=("TIFF",))
        image.seek(frame)
        return _loaded(image, name, max_pixels)


def _loaded(image: ImageFile.ImageFile, name: str, max_pixels: int, enough_px: int | None = None) -> Image.Image:
    """The pixels of an opened picture, as RGB."""
    _check_size(image.size, name, max_pixels)
    if enough_px is not None:
        image.draft(None, (enough_px, enough_px))
    image.load()  # never a second time: after a failure Pillow would return the partial pixels without an error
    return _to_rgb(image, name)


@contextmanager
def _clear_errors(data: bytes, name: str) -> Iterator[None]:
    """What a reader raises, as ImageError. `data` is the file's, its beginning at least."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data, name) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except MemoryError as error:
        raise ImageMemoryError(f"{name}: too little memory to decode it", SMALLER, "more memory") from error
    except DECODER_ERRORS as error:
        raise _damaged(name, _claimed_format(data), str(error) or type(error).__name__) from error


def too_little_memory(needed_bytes: int) -> int | None:
    """What is left of memory where it does not hold so much with a margin; None where it does, or nobody knows."""
    left = available_memory_bytes() if needed_bytes > NOTICED_BYTES else None
    return left if left is not None and needed_bytes > SHARE_OF_MEMORY * left else None


def refuse_beyond_memory(needed_bytes: int, what: str) -> None:
    """Raise ImageMemoryError where the memory that is left does not hold so much of a picture."""
    if (left := too_little_memory(needed_bytes)) is not None:
        raise ImageMemoryError(
            f"{what}: some {needed_bytes / 1e9:.1f} GB to read it, and {left / 1e9:.1f} GB of memory are left",
            SMALLER,
            "more memory",
        )


def stored_size(source: Path | bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from a file's header, before any EXIF rotation; None where it cannot be read."""
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would be waited for
            return None
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            return image.size
    except (*DECODER_ERRORS, Image.DecompressionBombError):
        return None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any loaded picture as RGB, detached from its file."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode == "F":
        raise ImageError(
            f"{name}: floating-point pixels (mode F) have no defined black and white",
            f"choose a range and convert it: magick {shlex.quote(name)} -auto-level -depth 8 converted.png",
        )
    if image.mode.startswith("I"):  # I, I;16, I;16B
        return _from_deep_grey(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.paste(rgba, (0, 0), rgba)
    return page.convert("RGB")


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Integer grey beyond 8 bits to mode L. White is the top of the smallest depth in `GREY_DEPTHS_BITS` that fits."""
    grey = np.asarray(image).astype(np.int64)  # (H, W)
    low, high = int(grey.min()), int(grey.max())
    white = next((2**bits - 1 for bits in GREY_DEPTHS_BITS if high < 2**bits), None)
    if low < 0 or white is None:
        raise ImageError(
            f"{name}: grey values from {low} to {high}, expected 0 to {2 ** GREY_DEPTHS_BITS[-1] - 1}",
            f"choose a range and convert it: magick {shlex.quote(name)} -auto-level -depth 8 converted.png",
        )
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        grey = white - grey  # Pillow honours this tag up to 8 bits only
    return Image.fromarray(((grey * 255 + white // 2) // white).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a loaded picture. Broken EXIF counts as absent: the pixels themselves are sound."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TO_UPRIGHT else 1


def _count_frames(image: ImageFile.ImageFile) -> int:
    """Counting walks through the file and moves the reader on, so it comes after the pixels are taken."""
    try:
        return int(getattr(image, "n_frames", 1))
    except DECODER_ERRORS:
        return 1


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} = {width * height:,} pixels, the limit is {max_pixels:,}")
    refuse_beyond_memory(BYTES_PER_PIXEL * width * height, f"{name}: {width} x {height} pixels")
    if width * height == 0:
        raise ImageError(f"{name}: a picture of {width} x {height} has no pixels", "export it again")


def _too_large(name: str, reason: str) -> ImageError:
    return ImageError(
        f"{name}: too large to decode safely: {reason}",
        f"if you trust the file, shrink it: magick {shlex.quote(name)} -resize 4096x4096 smaller.png",
    )


def _damaged(name: str, kind: str, reason: str) -> ImageError:
    return ImageError(
        f"{name}: damaged or incomplete {kind}: {reason}",
        "copy or download it again; if a viewer still shows it, save it from there as PNG",
    )


def _unidentified(data: bytes, name: str) -> ImageError:
    """The error for bytes that no reader took: a damaged header, or a format we do not read."""
    kind = _foreign_format(data)
    if not kind and (claimed := _claimed_format(data)) != "file":
        return _damaged(name, claimed, "its header cannot be read")
    return ImageError(
        f"{name}: unsupported format{f' ({kind})' if kind else ''}; supported are {', '.join(IMAGE_FORMATS)}",
        f"convert it first: magick {shlex.quote(name)} converted.png",
    )


def _claimed_format(data: bytes) -> str:
    """The format that the first bytes announce, or "file"."""
    prefix = data[:16]  # as much as Pillow shows its readers
    readers = ((name, Image.OPEN[name][1]) for name in IMAGE_FORMATS if name in Image.OPEN)
    return next((name for name, accepts in readers if accepts and accepts(prefix) is True), "file")


def _foreign_format(data: bytes) -> str:
    """The name of a common format that we do not read, or ""."""
    if data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in (b"hei", b"hev")):
        return "HEIC"
    if data.startswith(b"%PDF"):
        return "PDF"
    return "SVG or HTML text" if data.lstrip().startswith(b"<") else ""
