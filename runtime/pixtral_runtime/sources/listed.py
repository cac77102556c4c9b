"""Lists of pictures: CSV or TSV with a header, of which a column has paths or addresses."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.text_file import text_lines
from pixtral_runtime.sources.addresses import is_address
from pixtral_runtime.sources.data_file import DataFile, files_on_disk, reason_of, rest_of
from pixtral_runtime.sources.item import BrokenPicture, Item
from pixtral_runtime.sources.naming import UniqueIds
from pixtral_runtime.sources.remote import Addresses

LIST_SUFFIXES = (".csv", ".tsv")
PICTURE_COLUMNS = ("image", "file_name", "filename", "path", "file", "image_path", "url", "image_url")
TEXT_COLUMNS = ("tags", "caption", "text")  # the first that is there
SEPARATORS = ",;\t"  # of a CSV file; the one that its header has most of
SHOWN_COLUMNS = 40


@dataclass(frozen=True)
class _Row:
    """A row: the line at which it ends, what it says, and what is wrong with it."""

    line: int
    picture: str
    text: str | None
    problem: str = ""


class ListSource:
    """The pictures that one list names, in its order. Paths are relative to its folder.

    It is read twice, at first to see that it is whole. Raises InputError, also where it names nothing but addresses,
    and nothing may be fetched.
    """

    def __init__(self, file: DataFile, column: str | None = None, *, fetch: bool = False) -> None:
        self._file, self._column, self._addresses = file, column, Addresses(fetch)
        self.total = addresses = 0
        for row in self._rows():
            self.total += 1
            addresses += is_address(row.picture)
        if not self.total:
            raise InputError(f"{file.name} has no rows", "a header, and a row for each picture")
        if addresses == self.total and not fetch:
            raise InputError(
                f"{file.name} names its pictures by addresses, and nothing is fetched unasked",
                Option("fetch", note="fetches them"),
            )

    @property
    def files(self) -> tuple[Path, ...]:
        return files_on_disk(self._file)

    def __iter__(self) -> Iterator[Item]:
        ids = UniqueIds()
        try:
            for row in self._rows():
                yield self._item(row, ids)
        except InputError as error:  # it was whole before
            yield rest_of(self._file, str(error), error.remedies)

    def _item(self, row: _Row, ids: UniqueIds) -> Item:
        picture = self._picture(row)
        id = ids(str(picture) if not row.problem else f"{self._file.name}#line={row.line}")
        path = Path(row.picture if isinstance(picture, StoredPicture) else os.path.abspath(picture))
        tags = "" if row.text is None and isinstance(picture, StoredPicture) else row.text
        return Item(id, (picture,), path.stem, path.parent.name, tags)

    def _picture(self, row: _Row) -> Path | StoredPicture:
        if row.problem:
            label = f"{self._file.name}, line {row.line}"
            return BrokenPicture(name=label, file=self._file.path, problem=row.problem, remedies=("correct the line",))
        return self._addresses.picture(row.picture) if is_address(row.picture) else self._file.beside(row.picture)

    def _rows(self) -> Iterator[_Row]:
        """Raises InputError."""
        name = self._file.name
        with self._file.open() as file:
            lines = (line + "\n" for line in text_lines(file, name))
            try:
                header = next(lines, "")
                reader = csv.reader(itertools.chain([header], lines), delimiter=self._separator(header))
                columns = next(reader, [])
                at, text_at = self._chosen(columns)
                for cells in reader:
                    if cells:
                        yield _row(cells, len(columns), at, text_at, reader.line_num)
            except csv.Error as error:
                raise InputError(f"{name}, line {reader.line_num}: {error}", "correct the line") from error
            except OSError as error:
                raise InputError(f"{name} cannot be read: {reason_of(error)}", "copy or download it again") from error

    def _separator(self, header: str) -> str:
        if self._file.name.lower().endswith(".tsv"):
            return "\t"
        return max(SEPARATORS, key=header.count)

    def _chosen(self, columns: list[str]) -> tuple[int, int | None]:
        """Where the picture and the text of a row stand. Raises InputError, which lists the columns."""
        name, wanted = self._file.name, self._column
        lower = [column.strip().lower() for column in columns]
        found = [at for at, column in enumerate(lower) if column in PICTURE_COLUMNS]
        if wanted is not None:
            found = [at for at, column in enumerate(columns) if column.strip() == wanted]
        if len(found) != 1:
            several = f"has {len(found)} columns for pictures" if found else "has no column that is known for pictures"
            reason = several if wanted is None else f"has {len(found) or 'no'} column {wanted}"
            shown = ", ".join(columns[:SHOWN_COLUMNS])
            raise InputError(f"{name} {reason}; its columns: {shown}", Option("column", "NAME"))
        texts = [lower.index(column) for column in TEXT_COLUMNS if column in lower and lower.index(column) != found[0]]
        return found[0], texts[0] if texts else None


def _row(cells: list[str], columns: int, at: int, text_at: int | None, line: int) -> _Row:
    text = None if text_at is None else cells[text_at].strip() if text_at < len(cells) else ""
    if any(cells[columns:]):
        problem = f"it has {len(cells)} cells, the header {columns}; a separator within a cell needs quotes around it"
        return _Row(line, "", text, problem)
    picture = cells[at].strip() if at < len(cells) else ""
    return _Row(line, picture, text, "" if picture else "it names no picture")
