"""What `pixtral run` has written in the end when it was killed again and again, in each of its formats.

    python scripts/check_formats.py BUNDLE --kills 100                                      # minutes; on any machine
    python scripts/check_formats.py BUNDLE --input shards/ scan.pdf --formats webdataset    # any input that run takes

Each format gets its share of the kills. A job is begun, killed at a random moment and taken up by `--resume`, until it
has ended by itself before its kill, or was killed when all its records were there; then all is thrown away and begun
anew. A sixth of the kills falls before the first answer, half of them when a random number of answers is there, a third
into the writing at the end. At the end of each round everything must be what an undisturbed run has written:

- sidecars, shards of WebDataset and `metadata.jsonl` byte for byte;
- rows of Parquet, with their pictures, and of CSV but for the columns of times and of `reused_tokens`, and records but
  for these and their order, as two undisturbed runs differ in them too.

No record may be lost or made twice: what a kill costs is what was being answered, counted as `most_in_flight`. Without
`--input` pictures are made up. The last line is JSON; what is wrong ends it with exit 6.
"""

from __future__ import annotations

import argparse
import csv
import json
import random as random_module
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = {
    "sidecars": "--sidecar .txt",
    "csv": "--format csv",
    "parquet": "--format parquet",
    "embed": "--format parquet --embed",
    "webdataset": "--format webdataset",
    "imagefolder": "--format imagefolder",
}
MEASURED = ("reused_tokens", "image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms")
RESULTS = "r.jsonl"
INPUT = "in"
LIMIT_S = 300.0
POLL_S = 0.001


def make_pictures(folder: Path, count: int) -> None:
    """Pictures of which no two are equal: equal ones are asked about once."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (64, 64), (250, 250, 255 - number % 200))
        x = 8 + number % 24
        ImageDraw.Draw(picture).ellipse((x, 8, x + 30, 48), fill=(200, 5 * number % 200, 30))
        picture.save(folder / f"{number:04}.png")


@dataclass(frozen=True)
class Length:
    """Of an undisturbed run: its records, its seconds, those to the first record, and those from the last one on."""

    records: int
    seconds: float
    start_s: float
    end_s: float


@dataclass
class Trial:
    """One format, in one folder after the other: `command` is the same each time."""

    command: Sequence[str]
    inputs: Sequence[Path]
    random: random_module.Random
    faults: list[str] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)  # what kills fell into
    most_in_flight: int = 0
    litter: int = 0

    def lay_out(self, folder: Path) -> Path:
        (folder / INPUT).mkdir(parents=True)
        for path in self.inputs:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / INPUT / path.name)
        return folder

    def start(self, folder: Path, *more: str) -> subprocess.Popen[str]:
        names = [f"{INPUT}/{path.name}" for path in self.inputs]
        command = [*self.command[:1], *names, *self.command[1:], "-o", RESULTS, "--json", *more]
        line = [sys.executable, "-m", "pixtral_cli", "run", *command]
        return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Run to the end, undisturbed. Failed requests are no matter: both runs have them."""
        process = self.start(folder, "--resume")
        said, errors = process.communicate(timeout=LIMIT_S)
        if process.returncode not in (0, 5):
            raise SystemExit(f"exit {process.returncode}: {errors[-2000:]}")
        summary: dict[str, Any] = json.loads(said)
        return summary

    def timed(self, folder: Path) -> Length:
        """How long an undisturbed run takes."""
        process = self.start(folder, "--resume")
        started = last = time.monotonic()
        first, count = 0.0, 0
        while process.poll() is None:
            if (now := lines(folder)) != count:
                count, last = now, time.monotonic()
                first = first or last - started
            time.sleep(POLL_S)
        errors = process.communicate()[1]
        if process.returncode not in (0, 5):
            raise SystemExit(f"exit {process.returncode}: {errors[-2000:]}")
        ended = time.monotonic()
        return Length(count, ended - started, first, ended - last)

    def kill(self, folder: Path, length: Length) -> bool:
        """Go on, and kill it; False where it has ended before."""
        random, there = self.random, lines(folder)
        before = (folder / RESULTS).read_bytes() if there else b""
        until, moment_s, phase = 0, random.uniform(0, length.start_s), "start"
        if there == length.records:
            moment_s, phase = random.uniform(0, length.seconds), "end"
        elif (dice := random.random()) < 1 / 3:
            until, moment_s, phase = length.records, random.uniform(0, length.end_s), "end"
        elif dice < 5 / 6:
            until, moment_s, phase = random.randint(there + 1, length.records), random.uniform(0, 0.02), "answers"
        process = self.start(folder, "--resume")
        while process.poll() is None and lines(folder) < until:
            time.sleep(POLL_S)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment_s)
        was_running = process.poll() is None
        process.kill()
        process.communicate()
        if was_running:
            self.struck[phase] += 1
            self._judge(folder, before)
        return was_running

    def _judge(self, folder: Path, before: bytes) -> None:
        """Look at the file that a kill has left: all records of before, each id once."""
        after = (folder / RESULTS).read_bytes() if (folder / RESULTS).exists() else b""
        ids = Counter(json.loads(line)["id"] for line in after.splitlines(keepends=True) if line.endswith(b"\n"))
        kept = before[: before.rfind(b"\n") + 1]
        if not after.startswith(kept):
            self.faults.append("records of before were lost")
        if twice := [id for id, count in ids.items() if count > 1]:
            self.faults.append(f"asked again though there was a record: {twice[:3]}")
        begun = folder / f".{RESULTS}.underway"
        noted = begun.read_bytes().splitlines()[1:] if begun.exists() else []
        in_flight = {id for line in noted if (id := json.loads(line)) not in ids}
        self.most_in_flight = max(self.most_in_flight, len(in_flight))

    def round(self, folder: Path, most: int, length: Length, whole: dict[str, object]) -> int:
        """Kill a job at most so often, let it end, and compare. Returns how often it was killed."""
        kills = 0
        while kills < most and self.kill(folder, length):
            kills += 1
            if lines(folder) == length.records and self.random.random() < 0.5:
                break
        records = lines(folder)
        summary = self.finish(folder)
        if summary["kept"] != records:
            self.faults.append(f"{records} records were there, and {summary['kept']} of them were kept")
        found = contents(folder)
        for name in dict.fromkeys((*whole, *found)):
            if whole.get(name) != found.get(name):
                self.faults.append(f"after {kills} kills {name} is not what an undisturbed run writes")
        self.litter += sum(1 for path in folder.rglob(".*.tmp"))
        return kills


def lines(folder: Path) -> int:
    """Whole lines of the results."""
    try:
        return (folder / RESULTS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def contents(folder: Path) -> dict[str, object]:
    """What two runs of a job must agree in, by file."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> object:
    if path.parent.name == INPUT or INPUT in path.parts[-3:-1]:
        return path.read_bytes()
    if path.name == RESULTS:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        dropped = "times_ms", "reused_tokens", "seal"
        return {one["id"]: {name: one[name] for name in one if name not in dropped} for one in records}
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [{name: row[name] for name in row if name not in MEASURED} for row in csv.DictReader(file)]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).drop_columns(list(MEASURED)).to_pylist()
    return path.read_bytes()


def check(format: str, options: argparse.Namespace, inputs: Sequence[Path], kills: int, work: Path) -> dict[str, Any]:
    command = [str(options.bundle.resolve()), *FORMATS[format].split(), *options.more.split()]
    trial = Trial(command, inputs, random_module.Random(f"{options.seed} {format}"))
    undisturbed = trial.lay_out(work / "undisturbed")
    length = trial.timed(undisturbed)
    whole = contents(undisturbed)
    done = rounds = 0
    while done < kills:
        folder = trial.lay_out(work / f"round-{rounds}")
        done += trial.round(folder, kills - done, length, whole)
        rounds += 1
        shutil.rmtree(folder)
    return {
        "kills": done, "killed_in": dict(trial.struck), "rounds": rounds, "records": length.records,
        "seconds": round(length.seconds, 2), "seconds_of_writing": round(length.end_s, 3), "files": len(whole),
        "most_in_flight": trial.most_in_flight, "temporary_files_left": trial.litter, "faults": trial.faults[:20],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--input", type=Path, nargs="+", default=[], help="what to ask about")
    parser.add_argument("--pictures", type=int, default=40, help="to make up where there is no --input")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--kills", type=int, default=100, help="of all formats together")
    parser.add_argument("--more", default="--max-new-tokens 32 --batch 2 -r", help="options of 'pixtral run'")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for number, format in enumerate(options.formats):
        kills = options.kills // len(options.formats) + (number < options.kills % len(options.formats))
        with tempfile.TemporaryDirectory(prefix="check-formats-") as name:
            inputs = [path.resolve() for path in options.input]
            if not inputs:
                inputs = [Path(name) / "photos"]
                make_pictures(inputs[0], options.pictures)
            rows[format] = check(format, options, inputs, kills, Path(name))
        print(format, rows[format], file=sys.stderr)
    faults = [f"{format}: {fault}" for format, row in rows.items() for fault in row["faults"]]
    print(json.dumps({"kills": sum(row["kills"] for row in rows.values()), "formats": rows, "faults": faults}))
    sys.exit(6 if faults else 0)


if __name__ == "__main__":
    main()
