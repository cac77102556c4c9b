"""Images of a dataset's rows as files: bytes inside a table, paths beside it, or base64 where a table was exported."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from pixtral_runtime.errors import Option, unwritable
from pixtral_runtime.evaluation.task import RowError
from pixtral_runtime.files import write_atomically

SUFFIX_BY_START = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
SHOWN_CHARACTERS = 160  # of a path
SHORTEST_IMAGE_TEXT = 64  # characters of base64: a shorter one is the name of a file


class ImageStore:
    """Images of rows as files. Bytes are written to `folder` once, as they are, under the hash of their content.

    Several processes may share the folder. Paths are relative to `data`. Mistral's code compresses JPEGs once more on
    their way to the server; this does not.
    Raises InputError or MachineError where `folder` cannot be written.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data

    def __call__(self, image: object) -> Path:
        """The file of an image as a row has it. Raises RowError where there is none."""
        content = image.get("bytes") if isinstance(image, dict) else image
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(content, str) and (decoded := _decoded(content)):
            content = decoded
        if isinstance(content, bytes) and content:
            return self._written(content)
        if not isinstance(path, str) or not path:
            raise RowError("there is no image")
        found = self._data / path
        try:
            is_there = found.is_file()
        except OSError as error:  # longer than a name can be, or in a folder that is closed to us
            raise RowError(f"there is no file {_shown(path)}: {error.strerror}") from error
        if not is_there:
            raise RowError(f"there is no file {_shown(str(found))}")
        return found

    def _written(self, content: bytes) -> Path:
        path = self._folder / (hashlib.sha256(content).hexdigest() + (_suffix(content) or ".image"))
        try:
            if not path.exists() or path.read_bytes() != content:  # a crash or a disk may have changed it
                write_atomically(path, content, durable=False)
        except OSError as error:
            raise unwritable(path, error, Option("cache", "ANOTHER_FOLDER")) from error
        return path


def _shown(path: str) -> str:
    text = repr(path)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _suffix(content: bytes) -> str | None:
    return next((suffix for start, suffix in SUFFIX_BY_START.items() if content.startswith(start)), None)


def _decoded(source: str) -> bytes | None:
    """The image that a text in base64 is, in a data: URI or bare; None where it is something else. Raises RowError."""
    head, comma, body = source.partition(",")
    is_uri = bool(comma) and head.lower().startswith("data:")
    if not is_uri and len(source) < SHORTEST_IMAGE_TEXT:
        return None
    try:
        content = base64.b64decode("".join((body if is_uri else source).split()), validate=True)
    except ValueError:
        content = b""
    if _suffix(content) is not None:
        return content
    if is_uri:
        raise RowError(f"{head!r:.40} holds no image in base64")
    return None
