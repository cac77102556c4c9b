"""Files that are elsewhere, through `fsspec`: opened as streams or in parts, listed, and pictures fetched one by one.

What was lost on the way is asked for again, twice, where the other side can send a part of a file. No file ever ends
before its length: that is an error, whatever the connection says.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from pixtral_runtime.errors import (
    ImageError,
    InputError,
    Option,
    PixtralError,
)
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import SMALLER
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES
from pixtral_runtime.sources.addresses import is_address, without_query
from pixtral_runtime.sources.data_file import reason_of
from pixtral_runtime.sources.item import BrokenPicture
from pixtral_runtime.sources.remote_system import (
    TIMEOUT_S,
    WEB,
    file_system,
    may_pass,
    path_of,
    refusal,
    refusing,
    retried,
    scheme_of,
)

BLOCK_BYTES = 1 << 22  # that are asked for at a time
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere; its name is its address."""

    name: str
    path: Path | None = None

    def open(self, *, parts: bool = False) -> BinaryIO:
        with refusing(self.name):
            return retried(lambda: _open(self.name, parts))

    def beside(self, path: str) -> Path | StoredPicture:
        """A picture of the same place; never a file of this machine."""
        folder = posixpath.dirname(urlsplit(self.name).path if scheme_of(self.name) in WEB else self.name)
        if path.startswith("/") or ".." in path.split("/"):
            return BrokenPicture(
                name=path, problem=f"{self.name} may only name what lies beside or below it", remedies=("an address",)
            )
        if scheme_of(self.name) in WEB:
            parts = urlsplit(self.name)
            return RemotePicture(name=f"{parts.scheme}://{parts.netloc}{folder.rstrip('/')}/{path}")
        return RemotePicture(name=f"{folder}/{path}")


@dataclass(frozen=True, kw_only=True)
class RemotePicture(StoredPicture):
    """A picture that is elsewhere: its name is its address. It is fetched when it is read."""

    def read(self) -> bytes:
        try:
            return fetch_picture(self.name)
        except ImageError:
            raise
        except PixtralError as error:
            raise ImageError(str(error), *error.remedies) from error


@dataclass(frozen=True)
class Addresses:
    """What becomes of pictures that a list or a table names by addresses: they are fetched if that is allowed."""

    fetch: bool

    def picture(self, address: str) -> StoredPicture:
        if self.fetch:
            return RemotePicture(name=address)
        return BrokenPicture(
            name=address,
            problem="it is elsewhere, and nothing is fetched unasked",
            remedies=(Option("fetch", note="fetches pictures that are named by their addresses"),),
        )


def expand_address(address: str, *, recursive: bool = False) -> list[str]:
    """The files that an address means: itself, those that a glob matches, or those in a folder. Raises InputError."""
    with refusing(address):
        system, path = file_system(address), path_of(address)
        is_web = scheme_of(address) in WEB
        if "*" in without_query(address) or (not is_web and re.search(r"[?\[]", path)):
            found = retried(lambda: system.glob(path))
        elif address.endswith("/") or (not is_web and retried(lambda: system.isdir(path))):
            found = retried(lambda: system.find(path, maxdepth=None if recursive else 1))
        else:
            return [address]
    files = sorted(file for file in found if not file.endswith("/"))
    if not files:
        raise InputError(f"{address} matches nothing, or is an empty folder", "check the address")
    return [_address(address, file) for file in files]


def fetch_picture(address: str) -> bytes:
    """A picture's bytes. May be called by many threads. Raises ImageError, MissingPackageError."""
    try:
        with refusing(address):
            return retried(lambda: _fetch_from_web(address) if scheme_of(address) in WEB else _fetch(address))
    except InputError as error:
        raise ImageError(str(error), *error.remedies) from error


def _fetch(address: str) -> bytes:
    with file_system(address).open(path_of(address), "rb") as file:
        data = bytearray()
        while chunk := file.read(CHUNK_BYTES):
            data += chunk
            _check_size(len(data), address)
        if file.size is not None and len(data) < file.size:
            raise ConnectionError(f"{len(data):,} of {file.size:,} bytes came")
    return bytes(data)


def _fetch_from_web(address: str) -> bytes:
    from aiohttp import ClientTimeout
    from fsspec.asyn import sync

    system = file_system(address)

    async def get() -> bytes:
        session = await system.set_session()
        data = bytearray()
        async with session.get(system.encode_url(address), timeout=ClientTimeout(total=TIMEOUT_S)) as response:
            response.raise_for_status()
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                data += chunk
                _check_size(len(data), address)
        return bytes(data)

    return cast(bytes, sync(system.loop, get))


def _check_size(size: int, address: str) -> None:
    if size > LARGEST_FILE_BYTES:
        raise ImageError(f"{address}: more than {LARGEST_FILE_BYTES:,} bytes", SMALLER)


def _open(address: str, parts: bool) -> BinaryIO:
    system, path = file_system(address), path_of(address)
    if scheme_of(address) not in WEB or _gives_parts(system, address):
        file = system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
    elif parts:
        raise InputError(
            f"{address} is to be read in parts, and its server sends whole files only", "download it, and name the file"
        )
    else:
        file = system.open(path, "rb", block_size=0)
    return io.BufferedReader(_Stream(file, address), CHUNK_BYTES // 4)


def _gives_parts(system: Any, address: str) -> bool:
    """Whether a web server sends a part of the file when it is asked for one."""
    from fsspec.asyn import sync

    async def ask() -> bool:
        session = await system.set_session()
        async with session.get(system.encode_url(address), headers={"Range": "bytes=0-0"}) as response:
            if response.status == 416:  # an empty file
                return False
            response.raise_for_status()
            return bool(response.status == 206)

    return bool(sync(system.loop, ask))


class _Stream(io.RawIOBase):
    """A file of `fsspec`: what fails is tried again from where it was, if it can seek, and it ends where it should.

    Reading raises ConnectionError for what may pass, InputError for what will not.
    """

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name, self._at, self._size = file, name, 0, getattr(file, "size", None)
        self._has_ended = False  # without a length only reading tells, and asking twice is warned of

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation("seek")
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer) if self._size is None else max(0, min(len(buffer), self._size - self._at))
        data = self._read(wanted) if wanted and not self._has_ended else b""
        self._has_ended = self._size is None and not data
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        def read() -> bytes:
            if self._size is not None:
                self._file.seek(self._at)
            return bytes(self._file.read(size))

        try:
            data = retried(read) if self.seekable() else read()
        except Exception as error:  # of whatever library
            if not may_pass(error):
                raise refusal(error, self._name) from error
            raise ConnectionError(f"the connection was lost after {self._at:,} bytes: {reason_of(error)}") from error
        if not data and self._size is not None:
            raise ConnectionError(f"it ended after {self._at:,} of {self._size:,} bytes")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _address(like: str, path: str) -> str:
    return path if is_address(path) else f"{like.partition('://')[0]}://{path.lstrip('/')}"
