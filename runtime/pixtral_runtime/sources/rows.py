"""Pictures in the rows of tables that Apache Arrow reads: which column has them, and what a row becomes.

A picture is what Hugging Face's `datasets` writes, a struct of `bytes` and `path` of which either may be missing; bytes
alone; or a text, which is a path or an address. A list of those makes one item of several pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_runtime.errors import InputError, Option, extra_missing
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import SMALLER
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES
from pixtral_runtime.sources.addresses import is_address
from pixtral_runtime.sources.data_file import AGAIN, DataFile, files_on_disk
from pixtral_runtime.sources.item import BrokenPicture, Item, PictureData
from pixtral_runtime.sources.naming import name_and_directory
from pixtral_runtime.sources.remote import Addresses

if TYPE_CHECKING:
    import pyarrow as pa

PICTURE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
TEXT_COLUMNS = ("tags", "caption", "text")  # the first that is there
SHOWN_COLUMNS = 40


class TableSource:
    """One file of rows: which column was named, and how many rows there are, where that is known.

    `purpose` says to whom lacks pyarrow what it is for. Raises InputError, MissingPackageError.
    """

    purpose: str

    def __init__(self, file: DataFile, column: str | None = None, *, fetch: bool = False) -> None:
        self._file, self._column, self._addresses = file, column, Addresses(fetch)
        self.total: int | None = None
        import_pyarrow(self.purpose)
        if file.path is not None:
            self.check()

    @property
    def files(self) -> tuple[Path, ...]:
        return files_on_disk(self._file)

    def check(self) -> None:
        """Find the columns and count the rows. Raises InputError."""
        raise NotImplementedError


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read."""

    picture: str
    text: str | None

    @property
    def names(self) -> list[str]:
        return [self.picture] if self.text in (None, self.picture) else [self.picture, str(self.text)]


def choose_columns(schema: pa.Schema, wanted: str | None, file: str) -> Columns:
    """The column of pictures, as wanted or the only one that can be meant, and that of texts.

    Raises InputError, which lists the columns.
    """
    try:
        return _choose(schema, wanted, file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: the names of its columns are no text", *AGAIN) from error


def _choose(schema: pa.Schema, wanted: str | None, file: str) -> Columns:
    names = [wanted] if wanted is not None else _picture_columns(schema)
    if len(names) == 1 and schema.get_field_index(names[0]) >= 0:  # -1 also where two columns are called so
        if not _may_be_pictures(schema.field(names[0]).type):
            raise _no_column(schema, f"{file}: the column {names[0]} holds no pictures but", file, names[0])
        return Columns(names[0], _text_column(schema))
    if wanted is not None:
        raise _no_column(schema, f"{file} has no column {wanted}, but", file)
    if names:
        raise _no_column(schema, f"{file} has pictures in {', '.join(names)}; of its columns name one:", file)
    raise _no_column(schema, f"{file} has no column that is known for pictures, but", file)


def _no_column(schema: pa.Schema, reason: str, file: str, only: str | None = None) -> InputError:
    fields = [field for field in schema if only in (None, field.name)]
    shown = ", ".join(f"{field.name} ({field.type})" for field in fields[:SHOWN_COLUMNS])
    more = f" and {len(fields) - SHOWN_COLUMNS} more" if len(fields) > SHOWN_COLUMNS else ""
    return InputError(f"{reason} {shown}{more}", Option("column", "NAME"))


def _picture_columns(schema: pa.Schema) -> list[str]:
    """Those that Hugging Face's metadata calls so, else structs with bytes, else bytes under a usual name."""
    features = _features(schema)
    if declared := [name for name, feature in features.items() if _is_image(feature)]:
        return declared
    fields = [field for field in schema if not _is_other_media(features.get(field.name))]
    if structs := [field.name for field in fields if _is_struct(_within_list(field.type))]:
        return structs
    return [f.name for f in fields if f.name.lower() in PICTURE_COLUMNS and _is_binary(_within_list(f.type))]


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """What `datasets` notes of its columns; nothing where that cannot be read."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_image(feature: object) -> bool:
    if isinstance(feature, list) and len(feature) == 1:
        return _is_image(feature[0])
    if not isinstance(feature, dict):
        return False
    return feature.get("_type") == "Image" or ("feature" in feature and _is_image(feature["feature"]))


def _is_other_media(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") in ("Audio", "Video", "Pdf")


def _text_column(schema: pa.Schema) -> str | None:
    import pyarrow.types as types

    for name in TEXT_COLUMNS:
        if (at := schema.get_field_index(name)) >= 0:
            kind = _within_list(schema.field(at).type)
            if types.is_string(kind) or types.is_large_string(kind):
                return name
    return None


def _within_list(kind: pa.DataType) -> pa.DataType:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    kinds = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    return "bytes" in kinds and (_is_binary(kinds["bytes"]) or types.is_null(kinds["bytes"]))


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _may_be_pictures(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    inner = _within_list(kind)
    is_text = types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
    return bool(is_text or _is_binary(inner) or _is_struct(inner))


@dataclass(frozen=True)
class RowItems:
    """Makes items of the rows of one file."""

    file: DataFile
    columns: Columns
    addresses: Addresses

    def checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch whose cells can be read: pyarrow believes what a damaged file says of places in memory.

        Raises one of `damage()`.
        """
        batch = batch.select(self.columns.names)
        batch.validate(full=True)
        return batch

    def of(self, batch: pa.RecordBatch, first: int) -> Iterator[Item]:
        """Items of the rows of a checked batch, whose first is that of this number in the file."""
        texts = [None] * len(batch) if self.columns.text is None else batch.column(self.columns.text).to_pylist()
        for row, (cell, text) in enumerate(zip(batch.column(self.columns.picture), texts, strict=True), start=first):
            yield self._item(row, cell.as_py(), _tags(text))

    def lost(self, first: int, last: int, problem: str) -> Item:
        """What stands for rows that cannot be read."""
        id = f"{self.file.name}/{first}" if first == last else f"{self.file.name}/{first}-{last}"
        broken = BrokenPicture(name=id, file=self.file.path, problem=problem, remedies=AGAIN)
        return Item(id, (broken,), "", "", "")

    def _item(self, row: int, cell: object, tags: str) -> Item:
        id = f"{self.file.name}/{row}"
        cells = cell if isinstance(cell, list) else [cell]
        labels = [id] if len(cells) == 1 else [f"{id}, picture {n}" for n in range(1, len(cells) + 1)]
        parts = tuple(self._picture(one, label) for one, label in zip(cells, labels, strict=True))
        path = next((path for one in cells if (path := _path(one))), "")
        name, directory = name_and_directory(path, self.file.name)
        return Item(
            id, parts or (self._broken(id, "its list of pictures is empty"),), name or str(row), directory, tags
        )

    def _picture(self, cell: object, label: str) -> Path | StoredPicture:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            if len(data) > LARGEST_FILE_BYTES:
                return self._broken(label, f"{len(data):,} bytes, expected {LARGEST_FILE_BYTES:,} at most", SMALLER)
            return PictureData(name=label, file=self.file.path, data=data)
        if not (path := _path(cell)):
            return self._broken(label, "there is no picture in its row")
        if is_address(path):
            return self.addresses.picture(path)
        picture = self.file.beside(path)
        if isinstance(picture, Path) and not os.path.lexists(picture):
            return self._broken(label, f"its row has no bytes but a path, and there is no file {picture}")
        return picture

    def _broken(self, label: str, problem: str, remedy: str = "check the table") -> BrokenPicture:
        return BrokenPicture(name=label, file=self.file.path, problem=problem, remedies=(remedy,))


def _path(cell: object) -> str:
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else ""


def import_pyarrow(purpose: str) -> None:
    """Raises MissingPackageError where it is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise extra_missing("pyarrow", "tables", purpose) from error


def damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a file that is damaged, or cannot be read."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, LookupError, MemoryError)


def _tags(text: str | Sequence[str | None] | None) -> str:
    return text.strip() if isinstance(text, str) else ", ".join(one for one in text or () if one)
