"""Pictures as data: URLs, and those that are read only when they are wanted: a file may hold ten thousand of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image_files import read_image_file

DATA = re.compile(r"data:(?P<kind>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)
SHOWN_CHARACTERS = 60  # of a URL


def is_data_url(value: object) -> bool:
    return isinstance(value, str) and DATA.match(value) is not None


def data_of(url: str, name: str) -> bytes:
    """The bytes of a data: URL, in base64 or percent-encoded. Raises ImageError."""
    match = DATA.match(url)
    if match is None:
        raise ImageError(f"{name} is no data: URL", "data:image/png;base64,…")
    payload = url[match.end() :]
    try:
        if not match["parameters"].lower().endswith(";base64"):
            return unquote_to_bytes(payload)
        packed = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        packed = b"".join(packed.split()).rstrip(b"=")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"{name}: the data is no base64: {error}", "encode the file's bytes again") from error


def picture_file(picture: Path | StoredPicture) -> bytes:
    """The bytes of a picture's file. Raises ImageError."""
    if isinstance(picture, Path):
        return read_image_file(picture)
    if picture.file is None:
        return data_of(picture.url, picture.name)
    if picture.span is None:
        return read_image_file(picture.file)
    return data_of(_url_in(picture, picture.file, *picture.span), picture.name)


def _url_in(picture: StoredPicture, path: Path, start: int, end: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            url = str(json.loads(b'"' + file.read(end - start) + b'"'))
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except ValueError:
        url = ""
    if _digest(url) != picture.digest:
        raise ImageError(f"{path} was changed while it was worked on", "the same command again")
    return url


StorePicture = Callable[[str, bool], StoredPicture]
"""Keeps a picture that is a data: URL, to be seen small or not."""


def held(url: str, is_small: bool = False) -> StoredPicture:
    """A picture that is kept in memory."""
    return StoredPicture(_shown(url), url=url, is_small=is_small)


def stored_in(file: Path, line: bytes, start: int) -> StorePicture:
    """Pictures that stand in this line of a file, which begins at byte `start`."""

    def store(url: str, is_small: bool) -> StoredPicture:
        for written in (url, url.replace("/", "\\/")):  # as PHP writes it
            place = line.find(written.encode("utf-8", "surrogatepass"))
            if place >= 0:
                span = start + place, start + place + len(written.encode("utf-8", "surrogatepass"))
                return StoredPicture(_shown(url), file, span, _digest(url), is_small=is_small)
        return held(url, is_small)

    return store


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _shown(url: str) -> str:
    return url if len(url) <= SHOWN_CHARACTERS else url[: SHOWN_CHARACTERS - 1] + "…"
