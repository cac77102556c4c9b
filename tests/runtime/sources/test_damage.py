"""Archives, tables and lists with bytes changed, lost or added: an error or broken pictures, never a bug."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers.sources import contents
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.datasets import open_dataset

pa = pytest.importorskip("pyarrow", reason="the extra `tables` brings it")
pq = pytest.importorskip("pyarrow.parquet")
ROUNDS = 250


def whole(name: str) -> bytes:
    """A sound file of some ten kilobytes."""
    noise = random.Random(1)
    pictures = [noise.randbytes(300) for _ in range(20)]
    file = io.BytesIO()
    if ".tar" in name:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for n, data in enumerate(pictures):
                info = tarfile.TarInfo(f"{'ü' * 120 if n == 3 else n}.png")  # one has a header of its own for its name
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return gzip.compress(file.getvalue()) if name.endswith("gz") else file.getvalue()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for n, data in enumerate(pictures):
                archive.writestr(f"{n}.png", data)
        return file.getvalue()
    if name.endswith(".csv"):
        return b'path,text\n"a.png","two\nlines"\nb.png,z\n,\n' * 9
    table = pa.table({"image": [{"bytes": data, "path": "a.png"} for data in pictures], "text": ["x"] * 20})
    if name.endswith(".parquet"):
        pq.write_table(table, file, row_group_size=7)
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed, at, size = bytearray(data), chance.randrange(len(data)), chance.randrange(1, 600)
    how = chance.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        del changed[at : at + size]
    elif how == 2:
        changed[at:at] = chance.randbytes(size)
    elif how == 3:
        changed[at : at + 8] = chance.choice((b"\xff", b"\0", b"\x7f\xff")) * 8
    else:
        for _ in range(5):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.parquet", "a.arrow", "a.csv"])
def test_damage_is_an_error_or_a_broken_picture(tmp_path: Path, name: str) -> None:
    data, chance, path, refused, read = whole(name), random.Random(name), tmp_path / name, 0, 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged(data, chance))
        try:
            source = open_dataset(str(path))
        except InputError:
            refused += 1
            continue
        assert source is not None
        read += len(contents(source))  # whose ids are each there once
    assert 0 < refused < ROUNDS and read > ROUNDS
