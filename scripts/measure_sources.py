"""How fast pictures come from a folder and from archives and tables of the same pictures, and in how much memory.

    python scripts/measure_sources.py                       # 4,000 pictures of 100 kB, 100,000 rows of 2 kB
    python scripts/measure_sources.py --pictures 1000 --kilobytes 500 --rows 20000

The pictures are noise, which does not pack, as JPEGs do not. All sources are read in turn, several times, from the page
cache: each item, and each picture's bytes. Memory is what a process of its own has resident after a tenth of many small
pictures and after all of them. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from child_process import counters
from pixtral_runtime.inputs.image_files import collect_images, picture_file
from pixtral_runtime.sources.datasets import open_dataset

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, pictures: Iterable[bytes], group: int) -> None:
    """As Hugging Face writes pictures, with so many rows in a row group."""
    schema = pa.schema([("image", STRUCT)])
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, object]] = []
        for n, data in enumerate(pictures, start=1):
            rows.append({"bytes": data, "path": f"{n:06d}.jpg"})
            if n % group == 0:
                writer.write_batch(pa.record_batch([pa.array(rows, STRUCT)], schema), row_group_size=group)
                rows = []
        if rows:
            writer.write_batch(pa.record_batch([pa.array(rows, STRUCT)], schema), row_group_size=group)


def write_tar(path: Path, pictures: Iterable[bytes]) -> None:
    with tarfile.open(path, "w|") as tar:
        for n, data in enumerate(pictures, start=1):
            info = tarfile.TarInfo(f"{n:06d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep all


def write_zip(path: Path, pictures: Iterable[bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for n, data in enumerate(pictures, start=1):
            archive.writestr(f"{n:06d}.jpg", data)


def write_folder(path: Path, pictures: Iterable[bytes]) -> None:
    path.mkdir()
    for n, data in enumerate(pictures, start=1):
        (path / f"{n:06d}.jpg").write_bytes(data)


def read_all(place: Path, tell: Callable[[int], None] = lambda _: None) -> int:
    """Read every picture, and count them; `tell` hears of each."""
    source = open_dataset(str(place))
    parts = collect_images([str(place)]) if source is None else (part for item in source for part in item.parts)
    count = 0
    for part in parts:
        assert not isinstance(part, str)
        picture_file(part)
        count += 1
        tell(count)
    return count


def memory(place: Path, rows: int) -> None:
    """Print what is resident, in MB: at the start, after a tenth of the rows, after all, and at most."""
    resident: dict[str, float] = {}

    def note(name: str, key: str = "VmRSS") -> None:
        resident[name] = round(counters(Path("/proc/self/status"))[key] / 1e3, 1)

    note("start")
    read_all(place, lambda count: note("tenth") if count == rows // 10 else None)
    note("all")
    note("peak", "VmHWM")
    print(json.dumps(resident))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--kilobytes", type=int, default=100, help="of each picture")
    parser.add_argument("--rows", type=int, default=100_000, help="of the tables whose memory is measured")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory_of is not None:
        return memory(asked.memory_of, asked.rows)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"speed": speed(Path(folder), asked), "resident_mb": resident(Path(folder), asked)}, indent=1))


def speed(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    pictures = [os.urandom(1000 * asked.kilobytes) for _ in range(asked.pictures)]
    places = {
        "folder": folder / "photos",
        "tar": folder / "x.tar",
        "zip": folder / "x.zip",
        "parquet, row groups of 100": folder / "100.parquet",
        "parquet, row groups of 1000": folder / "1000.parquet",
    }
    write_folder(places["folder"], pictures)
    write_tar(places["tar"], pictures)
    write_zip(places["zip"], pictures)
    for group in (100, 1000):
        write_parquet(places[f"parquet, row groups of {group}"], pictures, group)
    del pictures
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for run in range(asked.runs + 1):
        for name, place in places.items():
            started = time.perf_counter()
            assert read_all(place) == asked.pictures
            if run:  # the first one reads from the disk
                seconds[name].append(time.perf_counter() - started)
    rates = {name: sorted(asked.pictures / value for value in values) for name, values in seconds.items()}
    return {
        "pictures": asked.pictures,
        "kilobytes": asked.kilobytes,
        "pictures_per_s": {
            name: {"median": round(statistics.median(values)), "min": round(values[0]), "max": round(values[-1])}
            for name, values in rates.items()
        },
    }


def resident(folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {"rows": asked.rows}
    for name, group in (("row groups of 1000", 1000), ("one row group", asked.rows)):
        place = folder / f"rows-{group}.parquet"
        write_parquet(place, (os.urandom(2000) for _ in range(asked.rows)), group)
        command = [sys.executable, __file__, "--memory-of", str(place), "--rows", str(asked.rows)]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        place.unlink()
    place = folder / "rows.tar"
    write_tar(place, (os.urandom(2000) for _ in range(asked.rows)))
    command = [sys.executable, __file__, "--memory-of", str(place), "--rows", str(asked.rows)]
    found["tar"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


if __name__ == "__main__":
    main()
