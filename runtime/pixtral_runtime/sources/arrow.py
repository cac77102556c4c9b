"""Pictures in Arrow files, as `datasets` saves them to the disk, one record batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.data_file import AGAIN, reason_of, rest_of
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.rows import RowItems, TableSource, choose_columns, damage

ARROW_SUFFIXES = (".arrow",)
FILE_START = b"ARROW1"  # of the format for files; `datasets` writes the one for streams
CONTINUATION = b"\xff\xff\xff\xff"  # how each message begins, but for those of 2019 and before
STREAM_END = CONTINUATION + bytes(4)


class ArrowSource(TableSource):
    """The rows of one Arrow file. Raises InputError, MissingPackageError."""

    purpose = "Reading Arrow files"

    def check(self) -> None:
        """Find the columns, and count the rows of a file on the disk, unless it is damaged. Raises InputError."""
        with self._opened() as (schema, _):
            choose_columns(schema, self._column, self._file.name)
        if self._file.path is not None:
            self.total = _rows_in(self._file.path)

    def __iter__(self) -> Iterator[Item]:
        try:
            with self._opened() as (schema, batches):
                rows = RowItems(self._file, choose_columns(schema, self._column, self._file.name), self._addresses)
                first = 0
                while (batch := _next(batches, rows)) is not None:
                    yield from rows.of(batch, first)
                    first += len(batch)
        except InputError as error:
            yield rest_of(self._file, str(error), error.remedies)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Iterator[Any]]]:
        """The schema, and the record batches. Raises InputError."""
        with self._file.open(parts=True) as stream:
            try:
                reader, batches = _read(stream)
            except damage() as error:
                raise InputError(f"{self._file.name} is no whole Arrow file: {reason_of(error)}", *AGAIN) from error
            with reader:
                yield reader.schema, batches


def _read(stream: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow.ipc as ipc

    start = stream.read(len(FILE_START))
    stream.seek(0)
    if start == FILE_START:
        reader = ipc.open_file(stream)
        return reader, (reader.get_batch(index) for index in range(reader.num_record_batches))
    return (reader := ipc.open_stream(stream)), _whole(reader, stream, start.startswith(CONTINUATION))


def _whole(batches: Any, stream: Any, has_end: bool) -> Iterator[Any]:
    """The batches of a stream. Raises EOFError where its end is missing, which pyarrow passes over."""
    yield from batches
    stream.seek(-len(STREAM_END), os.SEEK_END)
    if has_end and stream.read(len(STREAM_END)) != STREAM_END:
        raise EOFError("there is no end")


def _next(batches: Iterator[Any], rows: RowItems) -> Any:
    """The next batch, None at the end. Raises InputError where the file breaks off."""
    try:
        return None if (batch := next(batches, None)) is None else rows.checked(batch)
    except damage() as error:
        raise InputError(f"broken off: {reason_of(error)}", *AGAIN) from error


def _rows_in(path: Path) -> int | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            return sum(len(batch) for batch in _read(file)[1])
    except damage():
        return None
