"""Pictures as data: URLs, and those that are read only when they are wanted: a file may hold ten thousand of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture

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


@dataclass(frozen=True, kw_only=True)
class HeldUrl(StoredPicture):
    """A data: URL that cannot be read again, because it came through a pipe."""

    url: str

    def read(self) -> bytes:
        return data_of(self.url, self.name)


@dataclass(frozen=True, kw_only=True)
class UrlInFile(StoredPicture):
    """A data: URL within a file, from byte `start` to `end`, as JSON writes it; `digest` is that of the URL."""

    file: Path
    start: int
    end: int
    digest: str

    def read(self) -> bytes:
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                url = str(json.loads(b'"' + file.read(self.end - self.start) + b'"'))
        except OSError as error:
            raise ImageError(f"{self.file}: {error.strerror}", "check the path and its permissions") from error
        except ValueError:
            url = ""
        if _digest(url) != self.digest:
            raise ImageError(f"{self.file} was changed while it was worked on", "the same command again")
        return data_of(url, self.name)


StorePicture = Callable[[str, bool], StoredPicture]
"""Keeps a picture that is a data: URL, to be seen small or not."""


def held(url: str, is_small: bool = False) -> StoredPicture:
    """A picture that is kept in memory."""
    return HeldUrl(name=_shown(url), url=url, is_small=is_small)


def stored_in(file: Path, line: bytes, start: int) -> StorePicture:
    """Pictures that stand in this line of a file, which begins at byte `start`."""

    def store(url: str, is_small: bool) -> StoredPicture:
        for written in (url, url.replace("/", "\\/")):  # as PHP writes it
            place = line.find(written.encode("utf-8", "surrogatepass"))
            if place >= 0:
                first = start + place
                end = first + len(written.encode("utf-8", "surrogatepass"))
                return UrlInFile(
                    name=_shown(url), file=file, start=first, end=end, digest=_digest(url), is_small=is_small
                )
        return held(url, is_small)

    return store


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _shown(url: str) -> str:
    return url if len(url) <= SHOWN_CHARACTERS else url[: SHOWN_CHARACTERS - 1] + "…"
