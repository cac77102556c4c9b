"""How fast `pixtral run` is over a folder, and over the same pictures in a tar, a zip and a Parquet file.

    python scripts/measure_run_sources.py BUNDLE [--pictures 500] [--rounds 5]

Prints JSON: requests a second of each round and the median of their ratios to the folder's in the same round. Times
begin when the model is loaded. Exits 6 where a source is slower than 0.95 of the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GOAL = 0.95
SIDES_PX = (800, 600)
ROW_GROUP = 100  # rows, as Hugging Face's datasets write pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), args.pictures)
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(args.rounds):
            names = list(sources)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rates[name].append(run(args.bundle, sources[name], args.pictures))
    pairs = {name: zip(rates[name], rates["folder"], strict=True) for name in rates}
    ratios = {name: round(statistics.median(ours / folder for ours, folder in pair), 3) for name, pair in pairs.items()}
    holds = all(ratio >= GOAL for ratio in ratios.values())
    print(json.dumps({"requests_per_s": rates, "ratio_to_folder": ratios, "goal": GOAL, "holds": holds}, indent=2))
    return 0 if holds else 6


def write_sources(folder: Path, count: int) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(small).resize(SIDES_PX, Image.Resampling.BICUBIC).save(photos / f"{number:06}.jpg", quality=90)
    paths = sorted(photos.iterdir())
    with tarfile.open(folder / "a.tar", "w") as tar, zipfile.ZipFile(folder / "a.zip", "w") as album:
        for path in paths:
            tar.add(path, path.name)
            album.write(path, path.name)
    rows = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths]})
    pq.write_table(rows, folder / "a.parquet", row_group_size=ROW_GROUP)
    return {"folder": photos, "tar": folder / "a.tar", "zip": folder / "a.zip", "parquet": folder / "a.parquet"}


def run(bundle: Path, source: Path, count: int) -> float:
    results = source.parent / "results.jsonl"
    line = [sys.executable, "-m", "pixtral_cli", "run", str(bundle), str(source), "-o", str(results), "--force"]
    done = subprocess.run([*line, "--max-new-tokens", "4", "--json"], check=True, capture_output=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    assert (summary["answered"], summary["shared"]) == (count, 0), summary
    return float(summary["requests_per_s"])


if __name__ == "__main__":
    sys.exit(main())
