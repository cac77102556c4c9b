"""Which images a command means: files, folders, globs and lists, in a stable order.

Names are what the file system holds, in any bytes. A folder gives the files whose suffix says that they are pictures,
broken links and sub-folders that cannot be listed among them: their records then say what is wrong. What is passed
over is said.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixtral_runtime.errors import ImageError, InputError, Option
from pixtral_runtime.inputs.conversation import Message, StoredPicture
from pixtral_runtime.inputs.image import MAX_PIXELS, SMALLER, decode_image, refuse_beyond_memory

IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".icb", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
})  # fmt: skip
"""What counts as an image inside a folder. A file named by the user is tried whatever its suffix."""
RESOURCE_FORK = b"\x00\x05\x16\x07"  # what macOS puts beside a file, as `._NAME`, on disks of other systems
SHOWN_CHARACTERS = 80  # of a path that is none
LARGEST_FILE_BYTES = 4 * 4 * MAX_PIXELS  # four channels of 32 bits, uncompressed

ImageSource = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]
Note = Callable[[str], None]


@dataclass(frozen=True)
class _Look:
    """What is looked for in folders, and how often something was passed over, by what it was."""

    recursive: bool
    suffixes: Set[str]
    passed: Counter[str] = field(default_factory=Counter)


def collect_images(
    sources: Iterable[str], stdin: Iterable[bytes] = (), *, recursive: bool = False, note: Note = lambda _: None
) -> list[Path]:
    """Expand files, folders, globs and `-` (a list on stdin) into paths, each once, in the order given.

    A list has a path a line, or between zero bytes, as `find -print0` writes it; a path of it that does not exist is
    kept, so that its record says so. A folder gives its images sorted by name, with `recursive` those of its
    sub-folders too, linked ones included. `note` hears what was passed over. Raises InputError for another path that
    does not exist and where nothing is left.
    """
    return list(images_and_folders(sources, stdin, recursive=recursive, note=note))


def images_and_folders(
    sources: Iterable[str],
    stdin: Iterable[bytes] = (),
    *,
    recursive: bool = False,
    note: Note = lambda _: None,
    suffixes: Set[str] = IMAGE_SUFFIXES,
) -> dict[Path, Path]:
    """As `collect_images`, each image with the folder that was named and has it: its own where none was.

    A folder gives the files with these suffixes, in lower case: documents and videos too where they are among them.
    """
    look = _Look(recursive, suffixes)
    found: dict[Path, Path] = {}

    def add(images: Iterable[tuple[Path, Path]]) -> None:
        for path, folder in images:
            found.setdefault(path, folder)

    for source in sources:
        if source == "-":
            for line in _listed(stdin):
                add(_expand(line, look, is_listed=True))
        else:
            add(_expand(source, look))
    for what, count in look.passed.items():
        note(f"passed over: {count} {what}")
    if not found:
        deeper = () if recursive else (Option("recursive", note="looks into sub-folders"),)
        raise InputError(f"no images in {', '.join(sources)}", "name image files, or a folder that holds some", *deeper)
    return found


def _listed(stdin: Iterable[bytes]) -> list[str]:
    """The paths of a list, which are bytes: no encoding is asked of them."""
    data = b"".join(stdin).removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def _expand(source: str, look: _Look, *, is_listed: bool = False) -> Iterator[tuple[Path, Path]]:
    """Images, each with the folder that was meant or its own."""
    path = Path(source)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        matches = sorted(glob.glob(source, recursive=look.recursive))
        if matches and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) and not os.path.lexists(path):
            for match in matches:
                yield from _expand(match, look)
            return
        if is_listed or os.path.lexists(path):
            yield path, path.parent
            return
        raise _missing(source, error) from error
    except ValueError as error:  # a zero byte
        raise InputError(f"{source[:SHOWN_CHARACTERS]!r}: {error}", "check the path") from error
    if not is_folder:
        yield path, path.parent
        return
    try:
        os.scandir(path).close()
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}", "check its permissions") from error
    yield from ((image, path) for image in sorted(_images_in(path, look, set())))


def _missing(source: str, error: OSError) -> InputError:
    shown = _short(Path(source))
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return InputError(f"{shown} cannot be read: {error.strerror}", "check the path and its permissions")
    question = (Option("prompt", "QUESTION", "if it is what to ask"),) if " " in source else ()
    return InputError(
        f"{shown} does not exist", *question, "check the path; quote a glob so that it reaches pixtral whole"
    )


def _images_in(folder: Path, look: _Look, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """In no order. Each folder is looked into once, whatever links lead to it; `seen` has them."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError:
        yield folder
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
        path = folder / entry.name
        is_image = path.suffix.lower() in look.suffixes
        try:
            mode = path.stat().st_mode
        except OSError:
            if is_image:
                yield path
            continue
        if stat.S_ISDIR(mode):
            if look.recursive:
                yield from _images_in(path, look, seen)
        elif not is_image:
            look.passed[f"files called *{path.suffix.lower() or path.name}, which is no image's suffix"] += 1
        elif not stat.S_ISREG(mode):
            look.passed["pipes, sockets or devices with an image's suffix"] += 1
        elif entry.name.startswith("._") and _starts_with(path, RESOURCE_FORK):
            look.passed["resource forks of macOS (._*)"] += 1
        else:
            yield path


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class SmallFile(StoredPicture):
    """A file that is to be seen small."""

    file: Path
    is_small: bool = True

    def read(self) -> bytes:
        return read_image_file(self.file)


def picture_file(picture: Path | StoredPicture) -> bytes:
    """The bytes of a picture's file. Raises ImageError."""
    return read_image_file(picture) if isinstance(picture, Path) else picture.read()


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
        replace(m, content=tuple(open_image(part) if isinstance(part, Path) else part for part in m.content))
        for m in messages
    ]


def read_image_file(path: Path) -> bytes:
    """A file's bytes. Raises ImageError, for pipes, devices, and more than memory should hold as well."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE_BYTES:
            raise ImageError(f"{path}: {size:,} bytes, expected {LARGEST_FILE_BYTES:,} at most", SMALLER)
        refuse_beyond_memory(size, str(path))
        try:
            return file.read(LARGEST_FILE_BYTES)
        except OSError as error:
            raise _unreadable(path, error) from error


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises ImageError, for pipes and devices as well."""
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  the caller closes it
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # a zero byte
        raise ImageError(f"{_short(path)}: {error}", "check the path") from error
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ImageError(f"{path}: it is a pipe or a device", "save it to a file")


def _unreadable(path: Path, error: OSError) -> ImageError:
    reason = error.strerror
    if isinstance(error, IsADirectoryError):
        reason = "it is a folder" if os.access(path, os.R_OK | os.X_OK) else "a folder that cannot be listed"
    shown = _short(path) if error.errno == errno.ENAMETOOLONG else path
    return ImageError(f"{shown}: {reason}", "check the path and its permissions")


def _open_at_once(path: str, flags: int) -> int:
    """A pipe without a writer would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
