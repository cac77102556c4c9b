"""What watching a folder costs: seconds a look, share of a core and memory, with many files in it. Prints JSON.

python scripts/measure_watch.py --files 100000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from pixtral_runtime.device.memory import resident_memory_bytes
from pixtral_runtime.sources.watch import Watch

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40) + b"IEND\xaeB`\x82"


def measure(folder: Path, files: int, seconds: float) -> dict[str, float]:
    """Watch a folder of so many files until all were given, then for so many seconds more in which nothing comes."""
    for number in range(files):
        (folder / f"picture-{number:08}.png").write_bytes(PNG)
    before_bytes, started = resident_memory_bytes(), time.monotonic()
    idle: list[tuple[float, float]] = []
    watch = Watch([folder], note=lambda _: idle.append((time.monotonic(), time.thread_time())))
    pictures = iter(watch)
    for _ in range(files):
        next(pictures)
    given_s, grown_bytes = time.monotonic() - started, resident_memory_bytes() - before_bytes
    looks = 0
    look = watch._look

    def counted(now: float) -> list[object]:
        nonlocal looks
        looks += bool(idle)
        if idle and now - idle[0][0] > seconds:
            watch.close()
        return list(look(now))

    watch._look = counted  # type: ignore[method-assign, assignment]
    assert next(pictures, None) is None
    wall_s, core_s = time.monotonic() - idle[0][0], time.thread_time() - idle[0][1]
    return {
        "files": files,
        "given_s": round(given_s, 2),
        "looks": looks,
        "look_ms": round(1e3 * core_s / max(1, looks), 2),
        "core_share": round(core_s / wall_s, 4),
        "bytes_a_file": round(grown_bytes / files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments.files, arguments.seconds)))


if __name__ == "__main__":
    main()
