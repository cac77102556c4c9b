"""Files that are elsewhere, through `fsspec`: opened as streams or in parts, listed, and pictures fetched one by one.

What was lost on the way is asked for again, twice, where the other side can send a part of a file. No file ever ends
before its length: that is an error, whatever the connection says.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from pixtral_runtime.errors import (
    ImageError,
    InputError,
    MissingPackageError,
    Option,
    PixtralError,
    Remedy,
    extra_missing,
)
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import SMALLER
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES
from pixtral_runtime.sources.addresses import is_address
from pixtral_runtime.sources.data_file import reason_of
from pixtral_runtime.sources.item import BrokenPicture

BLOCK_BYTES = 1 << 22  # that are asked for at a time
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0  # without a byte, and for a whole picture
PAUSES_S = (0.5, 2.0)  # before it is tried again
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface-hub"}
WEB = ("http", "https")

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere; its name is its address."""

    name: str
    path: Path | None = None

    def open(self, *, parts: bool = False) -> BinaryIO:
        with refusing(self.name):
            return _retried(lambda: _open(self.name, parts))

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


def scheme_of(address: str) -> str:
    return address.partition("://")[0].lower()


def expand_address(address: str, *, recursive: bool = False) -> list[str]:
    """The files that an address means: itself, those that a glob matches, or those in a folder. Raises InputError."""
    with refusing(address):
        system, path = _system(address), _path(address)
        is_web = scheme_of(address) in WEB
        if "*" in path or (not is_web and re.search(r"[?\[]", path)):
            found = _retried(lambda: system.glob(path))
        elif address.endswith("/") or (not is_web and _retried(lambda: system.isdir(path))):
            found = _retried(lambda: system.find(path, maxdepth=None if recursive else 1))
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
            return _retried(lambda: _fetch_from_web(address) if scheme_of(address) in WEB else _fetch(address))
    except InputError as error:
        raise ImageError(str(error), *error.remedies) from error


def _fetch(address: str) -> bytes:
    with _system(address).open(_path(address), "rb") as file:
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

    system = _system(address)

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
    system, path = _system(address), _path(address)
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
        data = self._read(wanted) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        def read() -> bytes:
            if self._size is not None:
                self._file.seek(self._at)
            return bytes(self._file.read(size))

        try:
            data = _retried(read) if self.seekable() else read()
        except Exception as error:  # of whatever library
            if not _may_pass(error):
                raise _refusal(error, self._name) from error
            raise ConnectionError(f"the connection was lost after {self._at:,} bytes: {reason_of(error)}") from error
        if not data and self._size is not None:
            raise ConnectionError(f"it ended after {self._at:,} of {self._size:,} bytes")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _system(address: str) -> Any:
    """The file system of an address. Raises MissingPackageError."""
    try:
        import fsspec
    except ImportError as error:
        raise extra_missing("fsspec", "remote", f"Reading {scheme_of(address)}://") from error
    scheme = scheme_of(address)
    try:
        return fsspec.filesystem(scheme, **(_web_options() if scheme in WEB else {}))
    except ImportError as error:
        if scheme in PACKAGES and scheme != "hf":
            package = PACKAGES[scheme]
            raise MissingPackageError(
                f"Reading {scheme}:// needs the package '{package}'", f"pip install {package}"
            ) from error
        raise extra_missing(PACKAGES.get(scheme, "aiohttp"), "remote", f"Reading {scheme}://") from error


def _web_options() -> dict[str, Any]:
    """A long job keeps a connection for hours: only its silences are limited."""
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _path(address: str) -> str:
    """What the file system calls it."""
    return address if scheme_of(address) in WEB else address.partition("://")[2]


def _address(like: str, path: str) -> str:
    return path if is_address(path) else f"{like.partition('://')[0]}://{path.lstrip('/')}"


def _retried(work: Callable[[], Result]) -> Result:
    for pause_s in PAUSES_S:
        try:
            return work()
        except Exception as error:  # of whatever library
            if not _may_pass(error):
                raise
        time.sleep(pause_s)
    return work()


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error tells of."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    if isinstance(error, PixtralError | FileNotFoundError | PermissionError | ValueError | NotImplementedError):
        return False
    return (status := _status(error)) is None or status >= 500 or status in (408, 429)


@contextmanager
def refusing(address: str) -> Iterator[None]:
    """Errors of whatever library as InputError that says what to do."""
    try:
        yield
    except PixtralError:
        raise
    except Exception as error:
        raise _refusal(error, address) from error


def _refusal(error: Exception, address: str) -> InputError:
    reason, remedies = _explained(error, address)
    return InputError(f"{address}: {reason}", *remedies)


def _explained(error: Exception, address: str) -> tuple[str, tuple[Remedy, ...]]:
    causes = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    status = next((found for cause in causes if (found := _status(cause))), None)
    is_hub = scheme_of(address) == "hf"
    login = "hf auth login" if is_hub else "check the credentials and permissions of this machine"
    if any(type(cause).__name__ == "GatedRepoError" for cause in causes):
        return "its owner gives it to those who accept the conditions", ("accept them on its page", login)
    if status in (401, 403) or isinstance(error, PermissionError):
        return "it may not be read from here", (login,)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return "there is nothing", ("check the address", *((f"{login}, if it is private",) if is_hub else ()))
    if status is not None:
        return f"its server says {status}", ("try it again later",)
    return f"cannot be read: {reason_of(error)}", ("check the address and the connection",)
