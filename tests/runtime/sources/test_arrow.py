"""Arrow files of both formats, and what happened to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.sources import contents, errors, picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.arrow import ArrowSource
from pixtral_runtime.sources.data_file import LocalFile

pa = pytest.importorskip("pyarrow", reason="the extra `tables` brings it")


def write(path: Path, format: str, batches: int = 3) -> Path:
    table = pa.table({"image": [{"bytes": picture(n), "path": None} for n in range(10 * batches)]})
    new: Any = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[format]
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def source(path: Path, column: str | None = None) -> ArrowSource:
    return ArrowSource(LocalFile(str(path)), column)


@pytest.mark.parametrize("format", ["stream", "file"])
def test_rows_of_both_formats(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "x.arrow", format)
    table = source(path)
    assert contents(table) == {f"{path}/{n}": [picture(n)] for n in range(30)}
    assert table.total == 30 and len(list(table)) == 30 and table.files == (path,)


def test_a_stream_that_was_cut_off_anywhere_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.arrow", "stream")
    data = path.read_bytes()
    ends = [len(data) - 8, len(data) - 100, len(data) // 2]
    for end in ends:
        path.write_bytes(data[:end])
        found = list(contents(table := source(path)).items())
        assert [parts for _, parts in found[:-1]] == [[picture(n)] for n in range(len(found) - 1)]
        assert found[-1][0] == f"{path}#rest" and "broken off" in str(found[-1][1])
        assert table.total is None
    assert len(found) == 11  # a batch of ten


def test_the_column_is_asked_for_and_other_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.arrow", "stream")
    with pytest.raises(InputError, match=r"no column photo, but image \(struct"):
        source(path, "photo")
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="no whole Arrow file"):
        source(path)
    with pytest.raises(InputError, match="No such file"):
        source(tmp_path / "none.arrow")


def test_a_file_that_vanished_is_one_broken_item(tmp_path: Path) -> None:
    path = write(tmp_path / "x.arrow", "stream")
    opened = source(path)
    path.unlink()
    assert list(errors(opened)) == [f"{path}#rest"]
