"""How much memory a table of many records takes while it is written, and how long that is.

    python scripts/measure_tables.py --records 10000 100000 --formats csv parquet embed webdataset imagefolder

Records are made up and kept on the disk, as those of a job are. Each format and number has a process of its own, whose
memory is looked at all the time; what it had before it wrote is taken off, and so is what a table of ten records takes,
which is libraries. The pictures of `embed` and `webdataset` are `--picture-bytes` each. `merge` joins seven shards of
results to a Parquet file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FORMATS = ("jsonl", "csv", "parquet", "openai", "imagefolder", "embed", "webdataset", "merge")
SHARDS = 7


def picture(size: int) -> bytes:
    """A bitmap of about so many bytes."""
    from PIL import Image

    side = max(1, int((size / 3) ** 0.5))
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(1).randbytes(side * side * 3)).save(file, "BMP")
    return file.getvalue()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def written(format: str, records: int, picture_bytes: int, folder: Path) -> dict[str, Any]:
    """Write one table in this process: seconds, bytes on the disk, and how much memory grew meanwhile."""
    from pixtral_runtime.batch.asked_pictures import AnsweredRequests
    from pixtral_runtime.batch.record_store import InOrder, RecordStore
    from pixtral_runtime.batch.records import ImageInfo, Record, Request
    from pixtral_runtime.batch.results_file import ResultsFile
    from pixtral_runtime.batch.shards import merge_results
    from pixtral_runtime.batch.tables import write_table
    from pixtral_runtime.batch.webdataset import write_webdataset
    from pixtral_runtime.inputs.conversation import Message

    random.seed(records)
    image = folder / "a.bmp"
    image.write_bytes(picture(picture_bytes))
    digest = hashlib.sha256(image.read_bytes()).hexdigest()

    def record(number: int) -> Record:
        words = " ".join(random.choice(("a", "red", "blue", "square", "on", "the", "left")) for _ in range(40))
        info = ImageInfo(str(folder / f"{number:08d}.bmp"), digest, 8, 8)
        counts: dict[str, Any] = {
            "prompt_tokens": 900,
            "image_tokens": 800,
            "reused_tokens": 0,
            "new_tokens": number % 90,
        }
        times = {"image": random.random(), "vision": random.random(), "decode": random.random()}
        said = {"bundle": "made up", "temperature": 0.0}
        return Record(
            info.path, "What is shown?", "00", [info], f"{number:016x}", words, None, "stop", **counts, times_ms=times,
            settings=said,
        )  # fmt: skip

    class Asked:
        """Requests in a stream: each is made when it is wanted."""

        total = records

        def __iter__(self) -> Any:
            return (Request(id, (Message("user", (image, "What is shown?")),)) for id in order)

    store = RecordStore(folder)
    parts = [folder / f"part-{n}.jsonl" for n in range(SHARDS)]
    if format == "merge":
        for n, part in enumerate(parts):
            with ResultsFile.create(part) as file:
                for number in range(n, records, SHARDS):
                    file.append(record(number))
    else:
        for number in range(records):
            store.add(record(number))
    order = list(store)
    before, peak, is_done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    answered: Any = AnsweredRequests(Asked(), store)  # type: ignore[arg-type]
    target = folder / "out" / ("metadata.jsonl" if format == "imagefolder" else "table")
    if format == "merge":
        merge_results(parts, target, format="parquet")
    elif format == "webdataset":
        write_webdataset(answered, target)
    elif format == "embed":
        write_table(InOrder(store, order), target, "parquet", answered=answered)
    else:
        target = target if format != "imagefolder" else folder / target.name
        write_table(InOrder(store, order), target, format)
    seconds = time.perf_counter() - started
    is_done.set()
    watcher.join()
    files = target.parent.iterdir() if target.parent != folder else [target]
    size = sum(path.stat().st_size for path in files)
    return {"seconds": round(seconds, 2), "bytes": size, "grown_bytes": max(0, peak[0] - before)}


def measured(format: str, records: int, picture_bytes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--one",
            format,
            str(records),
            folder,
            "--picture-bytes",
            str(picture_bytes),
        ]
        result: dict[str, Any] = json.loads(subprocess.check_output(command))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["csv", "parquet", "imagefolder", "merge"])
    parser.add_argument("--picture-bytes", type=int, default=20_000)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        format, records, folder = options.one
        print(json.dumps(written(format, int(records), options.picture_bytes, Path(folder))))
        return
    rows = []
    for format in options.formats:
        base = measured(format, 10, options.picture_bytes)["grown_bytes"]
        for records in options.records:
            row = {"format": format, "records": records, **measured(format, records, options.picture_bytes)}
            rows.append(row | {"grown_beyond_ten_bytes": row["grown_bytes"] - base})
            print(rows[-1], file=sys.stderr)
    print(json.dumps({"picture_bytes": options.picture_bytes, "tables": rows}))


if __name__ == "__main__":
    main()
