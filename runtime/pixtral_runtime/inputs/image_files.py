"""Which images a command means: files, folders, globs and lists, in a stable order."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.errors import ImageError, InputError, Option
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.image import decode_image

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".heic",
        ".heif",
        ".ico",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""What counts as an image inside a folder. A file named by the user is tried whatever its suffix."""

ImageSource = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]


def collect_images(sources: Iterable[str], stdin: Iterable[str], *, recursive: bool = False) -> list[Path]:
    """Expand files, folders, globs and `-` (a list on stdin, a path a line) into paths, each once, in the order given.

    A folder gives its images sorted by name, with `recursive` those of its sub-folders too. Raises InputError for a
    path that does not exist and where nothing is left.
    """
    found: dict[Path, None] = {}
    for source in sources:
        lines = [line.rstrip("\r\n") for line in stdin] if source == "-" else [source]
        for line in filter(None, lines):
            found.update(dict.fromkeys(_expand(line, recursive)))
    if not found:
        deeper = () if recursive else (Option("recursive", note="looks into sub-folders"),)
        raise InputError(f"no images in {', '.join(sources)}", "name image files, or a folder that holds some", *deeper)
    return list(found)


def _expand(source: str, recursive: bool) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        files = path.rglob("*") if recursive else path.iterdir()
        yield from sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    elif path.exists():
        yield path
    elif matches := sorted(glob.glob(source, recursive=recursive)):
        for match in matches:
            yield from _expand(match, recursive)
    else:
        raise InputError(f"{source} does not exist", "check the path; quote a glob so that it reaches pixtral whole")


def open_image(source: ImageSource, *, apply_exif: bool = True) -> Image.Image:
    """An RGB picture from a path, a file's bytes, an array (rows, columns, 3), or a Pillow image (taken as it is).

    Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return decode_image(source, "image", apply_exif=apply_exif).pixels
    if isinstance(source, str | Path):
        return decode_image(read_image_file(Path(source)), str(source), apply_exif=apply_exif).pixels
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,) and source.size:
        return Image.fromarray(np.ascontiguousarray(source))
    found = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    raise ImageError(
        f"{found} is not taken as an image",
        "a path, a file's bytes, a Pillow image, or uint8 (rows, columns, 3)",
    )


def open_images(sources: ImageSource | Iterable[ImageSource]) -> list[Image.Image]:
    """The pictures of one source or of several. Raises ImageError."""
    if isinstance(sources, str | Path | bytes | Image.Image | np.ndarray) or not isinstance(sources, Iterable):
        sources = [sources]
    return [open_image(source) for source in sources]


def with_pictures(messages: Sequence[Message]) -> list[Message]:
    """The conversation with every path read. Raises ImageError."""
    return [
        Message(m.role, tuple(open_image(part) if isinstance(part, Path) else part for part in m.content))
        for m in messages
    ]


def read_image_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", "check the path and its permissions") from error
