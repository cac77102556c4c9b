"""Records as Parquet, row group by row group, so that no table is in memory; with the pictures themselves if wanted.

Pictures are written as Hugging Face's `datasets` write them, and are pictures again in `load_dataset("parquet", …)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import IO, Any

from pixtral_runtime.batch.asked_pictures import asked_pictures
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.batch.table_columns import TableColumns, encodable

ROWS = 1000  # of a group
ROWS_OF_PICTURES = 100
GROUP_BYTES = 1 << 25  # of pictures; a group is in memory while it is written
FEATURES = {bool: "bool", int: "int64", float: "float64", str: "string"}  # as both Arrow and `datasets` call them


def write_parquet(columns: TableColumns, records: Iterable[Record], file: IO[bytes]) -> None:
    """A row for each record."""
    _write(columns.types, {}, map(columns.row, records), file, ROWS)


def write_parquet_with_pictures(
    columns: TableColumns, answered: Iterable[tuple[Request, Record]], file: IO[bytes]
) -> None:
    """A row for each record, whose column `image` has the file of its picture; a list of them if any has several.

    Null stands for a picture that could not be read. Raises ImageError as `asked_pictures`.
    """
    is_list = columns.most_images > 1

    def row(request: Request, record: Record) -> dict[str, Any]:
        pictures = [
            None if copy is None else {"bytes": copy.data, "path": encodable(info.path)}
            for copy, info in zip(asked_pictures(request, record), record.images, strict=True)
        ]
        return columns.row(record) | {"image": pictures if is_list else next(iter(pictures), None)}

    image = {"_type": "Image"}
    rows = (row(request, record) for request, record in answered)
    _write(columns.types, {"image": [image] if is_list else image}, rows, file, ROWS_OF_PICTURES)


def _write(
    types: Mapping[str, type],
    pictures: Mapping[str, object],
    rows: Iterable[Mapping[str, Any]],
    file: IO[bytes],
    most_rows: int,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = {name: pa.type_for_alias(FEATURES[kind]) for name, kind in types.items()}
    fields |= {name: pa.list_(picture) if isinstance(kind, list) else picture for name, kind in pictures.items()}
    features = {name: {"dtype": FEATURES[kind], "_type": "Value"} for name, kind in types.items()} | dict(pictures)
    said = {"huggingface": json.dumps({"info": {"features": features}})} if pictures else None
    schema = pa.schema(fields, metadata=said)
    with pq.ParquetWriter(file, schema) as writer:
        group: list[Mapping[str, Any]] = []
        size = 0
        for row in rows:
            group.append(row)
            size += sum(_picture_bytes(row[name]) for name in pictures)
            if len(group) == most_rows or size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _picture_bytes(cell: Any) -> int:
    pictures = cell if isinstance(cell, list) else [cell]
    return sum(len(picture["bytes"]) for picture in pictures if picture is not None)
