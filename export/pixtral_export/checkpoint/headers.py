"""What safetensors files say of themselves: which tensors they hold, of which type and shape, and where.

A file is 8 bytes of length, a JSON header of that length, and data. The headers alone tell a truncated download, a
quantized copy or another model, before minutes of work or hours of download.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT
from pixtral_runtime.errors import CheckpointError

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)  # what a broken header raises
LFS_POINTER = b"version "  # how the text file starts that stands in for a large file in a clone without git-lfs


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    name: str  # as the file spells it
    file: Path
    dtype: str  # safetensors' code, such as BF16
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class Files(Protocol):
    """A checkpoint's files. Small ones lie in a folder of this machine, weights perhaps elsewhere."""

    @property
    def names(self) -> Collection[str]:
        """Of the files, without those in folders within."""

    def size(self, name: str) -> int | None:
        """In bytes; None where there is no such file."""

    def tensors(self, names: Sequence[str]) -> list[StoredTensor]:
        """What the headers of weight files say. Raises CheckpointError."""


@dataclass(frozen=True)
class LocalFiles:
    """The files of a folder."""

    folder: Path

    @property
    def names(self) -> Collection[str]:
        try:
            return [file.name for file in self.folder.iterdir() if file.is_file()]
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}", f"ls -ld {self.folder}") from error

    def size(self, name: str) -> int | None:
        try:
            file = (self.folder / name).stat()
        except (OSError, ValueError):  # not there, or a name that no file can have
            return None
        return file.st_size if S_ISREG(file.st_mode) else None

    def tensors(self, names: Sequence[str]) -> list[StoredTensor]:
        return [tensor for name in names for tensor in read_header(self.folder / name)]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a local file. Raises CheckpointError where it is cut off or no safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            data_start = 8 + int.from_bytes(start, "little")
            text = stream.read(data_start - 8) if data_start <= size else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", f"ls -l {file}") from error
    if start == LFS_POINTER:
        raise CheckpointError(
            f"{file} is a git-lfs pointer, not the weights: {size} bytes", f"git -C {file.parent} lfs pull"
        )
    if size < 8 or data_start > size:
        raise CheckpointError(
            f"{file} ends within its header, or is no safetensors file: "
            f"expected {max(data_start, 8)} bytes or more, seen {size}",
            DOWNLOAD_HINT,
        )
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        ends = sorted((data_start + entry["data_offsets"][1], name) for name, entry in entries.items())
        tensors = [
            stored_tensor(name, file, entry["dtype"], entry["shape"], data_start + entry["data_offsets"][0])
            for name, entry in entries.items()
        ]
    except MALFORMED as error:
        raise broken_header(file, repr(error)) from error
    for end, name in ends:
        if end > size:
            raise CheckpointError(
                f"{file} is cut off: expected {ends[-1][0]} bytes, seen {size}; "
                f"'{name}' is the first tensor beyond the end",
                DOWNLOAD_HINT,
            )
    return tensors


def stored_tensor(name: str, file: Path, dtype: Any, shape: Any, offset: Any) -> StoredTensor:
    """An entry of a header. Raises TypeError where it says something else than a header may."""
    if not isinstance(dtype, str) or not all(isinstance(size, int) for size in (*shape, offset)):
        raise TypeError(f"'{name}' has no dtype, shape and place")
    return StoredTensor(name, file, dtype, tuple(shape), offset)


def broken_header(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is no safetensors file: its header is broken ({reason})", DOWNLOAD_HINT)
