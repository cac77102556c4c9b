"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HASH_BLOCK_BYTES = 1 << 22


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path`, with its folder, once it is whole and on the disk. Raises OSError."""
    target = path.resolve()  # a link stays a link
    temporary = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    file = temporary.open("wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
