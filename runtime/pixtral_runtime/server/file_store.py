"""The files of the Batch API, in a folder: each is two, its data and a JSON that says what it is.

The JSON is written last and deleted first, so data without one belongs to no file, and is removed at the next start.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.files import replacing, write_atomically
from pixtral_runtime.json_data import from_json

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
INPUT, OUTPUT = "batch", "batch_output"


def new_id(kind: str) -> str:
    return kind + secrets.token_hex(12)


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file. `created_at` in seconds of Unix time."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's API shows it."""
        return asdict(self) | {"object": "file", "status": "processed", "expires_at": None, "status_details": None}


class FileStore:
    """Files by id, the oldest first. May be used by many threads."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = threading.Lock()
        found = [file for path in folder.glob("*.json") if (file := _read(path)) is not None]
        self._files = {file.id: file for file in sorted(found, key=lambda file: (file.created_at, file.id))}
        for path in folder.iterdir():
            if path.stem not in self._files and (path.suffix == ".tmp" or FILE_ID.fullmatch(path.stem)):
                path.unlink()

    def __len__(self) -> int:
        return len(self._files)

    def all(self) -> list[StoredFile]:
        with self._lock:
            return list(self._files.values())

    def get(self, id: str) -> StoredFile | None:
        return self._files.get(id)

    def path(self, id: str) -> Path:
        """Where a file's data lie; `id` is one of ours."""
        return self.folder / f"{id}.jsonl"

    def new_upload(self) -> Path:
        """Where to write data that are to become a file."""
        return self.folder / f".{secrets.token_hex(8)}.tmp"

    def adopt(self, upload: Path, filename: str) -> StoredFile:
        """Make a file of what was written and brought to the disk. Raises OSError."""
        file = StoredFile(new_id("file-"), upload.stat().st_size, int(time.time()), filename, INPUT)
        upload.rename(self.path(file.id))
        return self._add(file)

    def put(self, id: str, filename: str, lines: Iterable[bytes]) -> StoredFile | None:
        """Write a file of the server's own, or again; none where there is no line. Raises OSError."""
        size = 0
        with replacing(self.path(id)) as out:
            for line in lines:
                size += out.write(line)
        if not size:
            self.path(id).unlink()
            return None
        return self._add(StoredFile(id, size, int(time.time()), filename, OUTPUT))

    def delete(self, id: str) -> None:
        """Raises OSError."""
        with self._lock:
            self._files.pop(id, None)
            for path in (self.folder / f"{id}.json", self.path(id)):
                path.unlink(missing_ok=True)

    def _add(self, file: StoredFile) -> StoredFile:
        with self._lock:
            write_atomically(self.folder / f"{file.id}.json", json.dumps(asdict(file)).encode())
            self._files[file.id] = file
        return file


def _read(path: Path) -> StoredFile | None:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        file = from_json(StoredFile, json.loads(path.read_bytes()))
        if file.id == path.stem and FILE_ID.fullmatch(file.id) and path.with_suffix(".jsonl").is_file():
            return file
    return None
