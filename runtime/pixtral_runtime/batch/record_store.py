"""A job's records by their ids, on the disk: what is kept of each in memory is where it lies, some 400 bytes.

The file has no name, so that nobody but this process can change it, and it is gone with the process.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.record_lines import line_of, record_in
from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import unwritable

BLOCK_BYTES = 4096  # read at a time; a record has about a thousand
ANOTHER_TEMPORARY = "TMPDIR=FOLDER in front of the command"


class RecordStore(Mapping[str, Record]):
    """Records by id, in the order in which each came last. May be read by many threads while one adds and
    one drops.

    `folder` is where there is room for as much again as the results take; None for the system's own place for such
    files. Raises OSError where nothing can be written there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        file = tempfile.TemporaryFile("w+b", buffering=0, dir=folder)  # noqa: SIM115 - open as long as this lives
        weakref.finalize(self, file.close)
        self._descriptor, self._end = file.fileno(), 0
        self._starts: dict[str, int] = {}
        self._answered: dict[str, int] = {}  # of those with an answer, by key

    def add(self, record: Record) -> None:
        """Keep a record, in the place of one with the same id. Raises OSError on a full disk."""
        line = line_of(record)
        os.truncate(self._descriptor, self._end)  # what a full disk left of the one before
        written = 0
        while written < len(line):
            written += os.pwrite(self._descriptor, line[written:], self._end + written)
        self._starts.pop(record.id, None)
        self._starts[record.id] = self._end
        if record.key is not None and record.error is None:
            self._answered.setdefault(record.key, self._end)
        self._end += len(line)

    def drop(self, id: str) -> None:
        """Keep the record of this id no longer, if there is one."""
        self._starts.pop(id, None)

    def answer_to(self, key: str | None) -> Record | None:
        """A record with an answer to the same question about the same pictures."""
        start = None if key is None else self._answered.get(key)
        return None if start is None else record_in(self._line(start))

    def lines(self) -> Iterator[bytes]:
        """The records as they are written to files."""
        return (self._line(start) for start in list(self._starts.values()))

    def __getitem__(self, id: str) -> Record:
        return record_in(self._line(self._starts[id]))

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._starts))

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, id: object) -> bool:
        return id in self._starts

    def _line(self, start: int) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            block = os.pread(self._descriptor, BLOCK_BYTES, start + len(line))
            if not block:
                raise OSError(f"a record of {len(line)} bytes has no end")
            line += block[: block.find(b"\n") + 1 or len(block)]
        return line


def temporary_store() -> RecordStore:
    """A store in the system's place for such files. Raises InputError or MachineError where it cannot be there."""
    try:
        return RecordStore()
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()), error, ANOTHER_TEMPORARY) from error


@dataclass(frozen=True)
class InOrder(Sequence[Record]):
    """Records by the order of their ids, read when they are wanted."""

    records: Mapping[str, Record]
    order: Sequence[str]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return InOrder(self.records, self.order[index])
        return self.records[self.order[index]]
