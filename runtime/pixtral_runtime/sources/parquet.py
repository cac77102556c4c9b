"""Pictures in Parquet files, read some rows at a time, in memory that does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.data_file import reason_of, rest_of
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.rows import Columns, RowItems, TableSource, choose_columns, damage

PARQUET_SUFFIXES = (".parquet",)
READ_BYTES = 1 << 20  # of a column at a time; pyarrow would take a row group's whole column into memory
BATCH_BYTES = 1 << 23  # of rows that are decoded at a time, about
MOST_BATCH_ROWS = 256
POINTER = b"version https://git-lfs"


class ParquetSource(TableSource):
    """The rows of one Parquet file. Raises InputError, MissingPackageError.

    One that is elsewhere is opened when it is read, and its rows are not counted before: there may be thousands.
    """

    purpose = "Reading Parquet"

    def check(self) -> None:
        """Find the columns and count the rows. Raises InputError."""
        with self._opened() as table:
            self._choose(table)
            self.total = table.metadata.num_rows

    def __iter__(self) -> Iterator[Item]:
        try:
            with self._opened() as table:
                rows = RowItems(self._file, self._choose(table), self._addresses)
                first = 0
                for group in range(table.metadata.num_row_groups):
                    yield from self._group_items(table, group, first, rows)
                    first += table.metadata.row_group(group).num_rows
        except InputError as error:  # it is elsewhere, or was another file before
            yield rest_of(self._file, str(error), error.remedies)

    def _group_items(self, table: Any, group: int, first: int, rows: RowItems) -> Iterator[Item]:
        """Items of a row group; one for all its rows from the first that cannot be read."""
        meta = table.metadata.row_group(group)
        batches: Iterator[Any] | None = None
        last = first + meta.num_rows - 1
        while first <= last:
            try:
                batches = batches or _batches(table, group, rows.columns)
                batch = rows.checked(next(batches))
            except StopIteration:
                yield rows.lost(first, last, "there are fewer rows than it says")
                return
            except damage() as error:
                yield rows.lost(first, last, reason_of(error))
                return
            yield from rows.of(batch, first)
            first += len(batch)

    def _choose(self, table: Any) -> Columns:
        return choose_columns(table.schema_arrow, self._column, self._file.name)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A `pyarrow.parquet.ParquetFile`. Raises InputError."""
        import pyarrow.parquet as pq

        with self._file.open(parts=True) as stream:
            try:
                table = pq.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
                _ = table.schema_arrow  # raises where the file is damaged
            except damage() as error:
                reason = f"{self._file.name} is no whole Parquet file: {reason_of(error)}"
                raise InputError(reason, *_again(stream)) from error
            with table:
                yield table


def _batches(table: Any, group: int, columns: Columns) -> Iterator[Any]:
    """The rows of a row group, so many at a time that they are of a moderate size."""
    meta = table.metadata.row_group(group)  # its columns' own sizes are not asked for: damaged ones abort the process
    rows = max(1, min(MOST_BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
    return iter(table.iter_batches(batch_size=rows, row_groups=[group], columns=columns.names, use_threads=False))


def _again(stream: Any) -> tuple[str, ...]:
    stream.seek(0)
    if stream.read(len(POINTER)) == POINTER:
        return ("git lfs pull, since it is only the pointer to the file",)
    return ("download it again",)
